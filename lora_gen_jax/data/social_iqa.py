"""A tensorflow-datasets builder of Social IQa, which TFDS does not carry. Needs no TensorFlow.

In: the published archive, or the files from it in `manual_dir` (`{train,dev}.jsonl` with `{train,dev}-labels.lst`).
Out: splits train (33,410 rows) and validation (1,954 rows) of context, question, three answers and the label.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from lora_gen_jax.data.jsonl import read_rows
from lora_gen_jax.data.reasoning import join_labels
from lora_gen_jax.errors import DataError
from lora_gen_jax.untrusted import file_digest

URL = "https://storage.googleapis.com/ai2-mosaic/public/socialiqa/socialiqa-train-dev.zip"
# As the archive has always been; Hugging Face's `datasets` and AI2's `rainbow` record the same.
SHA256 = "ee073914a0fc33265cfbcfc50ec20df9b2e07809c3f420f599138d1f394ef5c3"
_TEXTS = ("context", "question", "answerA", "answerB", "answerC")
_FILES = {"train": ("train.jsonl",), "validation": ("dev.jsonl", "validation.jsonl")}


class SocialIqa(tfds.core.GeneratorBasedBuilder):
    """Social IQa (Sap et al., arXiv:1904.09728): questions about people's motives, reactions and next steps.

    `label` is a class named as in the original files: "1", "2", "3".
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "The published train and dev files."}

    def __init__(self, *, manual_dir: str | Path | None = None, **kwargs: Any) -> None:
        """`manual_dir`: a folder with the unpacked files (at any depth); left out, the archive is downloaded."""
        self._files_dir = None if manual_dir is None else Path(manual_dir)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {name: tfds.features.Text() for name in _TEXTS}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({**texts, "label": tfds.features.ClassLabel(names=["1", "2", "3"])}),
            homepage="https://leaderboard.allenai.org/socialiqa",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        root = self._files_dir or unzip(checked(Path(dl_manager.download(URL))))
        return {split: self._generate_examples(_find(root, names)) for split, names in _FILES.items()}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
        for index, (line, row) in enumerate(join_labels(path, read_rows(path))):
            missing = [name for name in (*_TEXTS, "label") if name not in row]
            if missing:
                raise DataError(
                    f"{path}:{line}: the field {missing[0]!r} is missing", field=f"{path.name}:{line}:{missing[0]}"
                )
            yield index, {name: str(row[name]) for name in (*_TEXTS, "label")}


def checked(archive: Path) -> Path:
    """The archive, if it is the published one. Raises DataError when it is not."""
    if (found := file_digest(archive)) != SHA256:
        problem = f"{archive}: not the published archive of Social IQa: its SHA-256 is {found}"
        raise DataError(problem, field=archive.name, code="sha256", remedy="delete it, so that it is downloaded again")
    return archive


def unzip(archive: Path) -> Path:
    """Unpacks a zip archive beside itself and returns the folder. TFDS's own extraction needs TensorFlow."""
    folder = archive.with_name(f"{archive.name}.unpacked")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


def _find(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        for path in sorted(root.rglob(name)):
            return path
    raise DataError(f"{root} holds no {names[0]} of Social IQa", field=names[0])
