"""The eight reasoning tasks from tensorflow-datasets. In: a TFDS directory. Out: the same `Task`s as from files.

TFDS records become rows of the original schemas and go through `rows.py`: one place for the texts. Reads array_record
through `tfds.data_source`, which needs no TensorFlow.
"""

import importlib
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tensorflow_datasets as tfds

from lora_gen_jax.data.reasoning import DEFAULT_RESERVE, REASONING_TASKS, assemble, example_maker
from lora_gen_jax.data.rows import Row
from lora_gen_jax.data.social_iqa import unzip
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A TFDS data set: its name, its train split, how a record becomes a row, the module that registers it."""

    name: str
    to_row: Callable[[Record], Row]
    train: str = "train"
    module: str = ""


def arc_row(record: Record) -> Row:
    """TFDS stores the labels "A" to "E" as 0 to 4."""
    texts, labels = record["choices"]["text"], record["choices"]["label"]
    choices = [{"text": _text(t), "label": _letter(i)} for t, i in zip(texts, labels, strict=True)]
    question = {"stem": _text(record["question"]), "choices": choices}
    return {"id": _text(record["id"]), "question": question, "answerKey": _letter(record["answerKey"])}


def openbookqa_row(record: Record) -> Row:
    """TFDS spreads the choices over four fields and keeps no id."""
    question = record["question"]
    choices = [{"text": _text(question[f"choice_{letter}"]), "label": letter} for letter in "ABCD"]
    return {
        "question": {"stem": _text(question["stem"]), "choices": choices},
        "answerKey": _letter(record["answerKey"]),
    }


def boolq_row(record: Record) -> Row:
    """The original row."""
    texts = {name: _text(record[name]) for name in ("question", "title", "passage")}
    return {**texts, "answer": bool(record["answer"])}


def social_iqa_row(record: Record) -> Row:
    """Our own builder stores the labels "1" to "3" as 0 to 2."""
    texts = {name: _text(record[name]) for name in ("context", "question", "answerA", "answerB", "answerC")}
    return {**texts, "label": str(int(record["label"]) + 1)}


def hellaswag_row(record: Record) -> Row:
    """TFDS keeps only ctx, not ctx_a and ctx_b."""
    texts = {name: _text(record[name]) for name in ("activity_label", "source_id")}
    endings = [_text(ending) for ending in record["endings"]]
    return {**texts, "ctx": _text(record["context"]), "endings": endings, "label": int(record["label"])}


def winogrande_row(record: Record) -> Row:
    """TFDS stores the answers "1" and "2" as 0 and 1 and keeps no id."""
    texts = {name: _text(record[name]) for name in ("sentence", "option1", "option2")}
    return {**texts, "answer": str(int(record["label"]) + 1)}


def piqa_row(record: Record) -> Row:
    """The original row, its label merged in."""
    return {**{name: _text(record[name]) for name in ("id", "goal", "sol1", "sol2")}, "label": int(record["label"])}


SOURCES: dict[str, Source] = {
    "arc_challenge": Source("ai2_arc/ARC-Challenge", arc_row),
    "arc_easy": Source("ai2_arc/ARC-Easy", arc_row),
    "openbookqa": Source("openbookqa", openbookqa_row),
    "boolq": Source("bool_q", boolq_row),
    # Registered by the import of social_iqa.py above.
    "social_iqa": Source("social_iqa", social_iqa_row),
    # These two are not found by name before their module has been imported.
    "hellaswag": Source("hellaswag", hellaswag_row, module="tensorflow_datasets.text.hellaswag"),
    "winogrande": Source("winogrande", winogrande_row, "train_xl", module="tensorflow_datasets.text.winogrande"),
    "piqa": Source("piqa", piqa_row),
}


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
    if name not in SOURCES:
        raise DataError(
            f"unknown reasoning task {name!r}; known: {', '.join(REASONING_TASKS)}", field="data.tasks", code="unknown"
        )
    if SOURCES[name].module:
        importlib.import_module(SOURCES[name].module)
    return SOURCES[name]


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
        f"{name}: the tensorflow-datasets data set {SOURCES[name].name} is not prepared as array_record in "
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


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _letter(index: Any) -> str:
    return "ABCDE"[int(index)] if int(index) >= 0 else ""
