"""The eight reasoning tasks from tensorflow-datasets. In: a TFDS directory. Out: the same `Task`s as from files.

Records become rows of the original schemas (`rows.py`): one place for the texts. Reads array_record
through `tfds.data_source`, which needs no TensorFlow.
"""

import importlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import tensorflow_datasets as tfds

from lora_gen_jax.data.reasoning import DEFAULT_RESERVE, REASONING_TASKS, assemble, example_maker
from lora_gen_jax.data.rows import Source
from lora_gen_jax.data.social_iqa import unzip  # which registers Social IQa
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError


def load_tfds(tfds_dir: str | Path | None, names: Iterable[str], *, reserve: int = DEFAULT_RESERVE) -> dict[str, Task]:
    """The named reasoning tasks from data sets prepared in `tfds_dir` (left out: TFDS's own default directory).

    Nothing is downloaded. Raises DataError: an unknown name; a data set that is not prepared as array_record, with
    the command that prepares it.
    """
    where = "the tensorflow-datasets directory" if tfds_dir is None else str(tfds_dir)

    def read(name: str, split: str) -> list[Example] | None:
        return _read_split(tfds_dir, name, split)

    names = tuple(names)
    for name in names:
        if not _is_prepared(tfds_dir, name):
            raise DataError(_how_to_prepare(tfds_dir, name), field="data.tfds_dir")
    return {name: assemble(name, read, where=where, reserve=reserve) for name in names}


def prepare(name: str, tfds_dir: str | Path | None = None, manual_dir: str | Path | None = None) -> None:
    """Downloads and prepares the data set of one reasoning task as array_record, without TensorFlow.

    `manual_dir` holds the original Social IQa files where they should not be downloaded; other tasks ignore it.
    Raises DataError for an unknown name.
    """
    source = _source(name)
    own: dict[str, Any] = {"manual_dir": manual_dir} if name == "social_iqa" else {}
    builder = tfds.builder(source.name, data_dir=_data_dir(tfds_dir), file_format="array_record", **own)
    # TFDS downloads without TensorFlow but unpacks with it; the archives of these data sets are all zip files.
    with mock.patch.object(tfds.download.DownloadManager, "download_and_extract", _download_and_unzip):
        builder.download_and_prepare()


def _download_and_unzip(manager: tfds.download.DownloadManager, urls: Any) -> Any:
    def unpacked(path: Any) -> Path:
        return unzip(Path(path)) if zipfile.is_zipfile(path) else Path(path)

    paths = manager.download(urls)
    return {name: unpacked(path) for name, path in paths.items()} if isinstance(paths, dict) else unpacked(paths)


def _source(name: str) -> Source:
    if name not in REASONING_TASKS:
        raise DataError(
            f"unknown reasoning task {name!r}; known: {', '.join(REASONING_TASKS)}", field="data.tasks", code="unknown"
        )
    if (source := REASONING_TASKS[name].tfds) is None:
        remedy = "give the original files with --data.dir"
        raise DataError(f"{name}: tensorflow-datasets has no such data set", field="data.tfds_dir", remedy=remedy)
    if source.module:
        importlib.import_module(source.module)
    return source


def _builder(tfds_dir: str | Path | None, name: str) -> Any:
    return tfds.builder(_source(name).name, data_dir=_data_dir(tfds_dir), file_format="array_record")


def _is_prepared(tfds_dir: str | Path | None, name: str) -> bool:
    builder = _builder(tfds_dir, name)
    random_access = tfds.core.FileFormat.with_random_access()
    return builder.is_prepared() and bool(builder.info.available_file_formats() & set(random_access))


def _how_to_prepare(tfds_dir: str | Path | None, name: str) -> str:
    where = "" if tfds_dir is None else f", {str(tfds_dir)!r}"
    command = f'python -c "from lora_gen_jax.data.tfds_source import prepare; prepare({name!r}{where})"'
    return (
        f"{name}: the tensorflow-datasets data set {_source(name).name} is not prepared as array_record in "
        f"{_builder(tfds_dir, name).data_path}; prepare it with\n  {command}\n"
        "or give the original files with --data.dir"
    )


def _read_split(tfds_dir: str | Path | None, name: str, split: str) -> list[Example] | None:
    source = _source(name)
    key = source.train if split == "train" else split
    if not _is_prepared(tfds_dir, name) or key not in _builder(tfds_dir, name).info.splits:
        return None
    records = tfds.data_source(source.name, split=key, data_dir=_data_dir(tfds_dir), download=False)
    make = example_maker(name, split)
    try:
        return [make(index, source.to_row(record)) for index, record in enumerate(records)]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        problem = f"{name}: malformed record in {source.name}, split {key}: {error!r}"
        raise DataError(problem, field=f"{source.name}:{key}", code="malformed") from error


def _data_dir(tfds_dir: str | Path | None) -> str | None:
    return None if tfds_dir is None else str(Path(tfds_dir).expanduser())
