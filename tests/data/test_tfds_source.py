"""TFDS offline and without TensorFlow: the real builders prepare made-up releases; tasks equal those from files."""

import functools
import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers import raises

from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.reasoning import REASONING_TASKS, load_reasoning
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError

tfds = pytest.importorskip("tensorflow_datasets")
from lora_gen_jax.data import social_iqa, tfds_source  # noqa: E402

# Warnings of TFDS's writers and of protobuf are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")


_ARCHIVES = {
    "ARC-V1-Feb2018.zip": ("arc_easy", "arc_challenge"),
    "OpenBookQA-V1-Sep2018.zip": ("openbookqa",),
    "winogrande_1.1.zip": ("winogrande",),
    "physicaliqa-train-dev.zip": ("piqa",),
    "socialiqa-train-dev.zip": ("social_iqa",),
}


@pytest.fixture(scope="module")
def prepared(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight data sets, prepared by their real builders from archives of the made-up release."""
    tfds.disable_progress_bar()
    root = tmp_path_factory.mktemp("tfds")
    downloads = tmp_path_factory.mktemp("downloads")
    for name, folders in _ARCHIVES.items():
        with zipfile.ZipFile(downloads / name, "w") as archive:
            for folder in folders:
                for path in sorted((release / folder).rglob("*.*")):
                    archive.write(path, path.relative_to(release / folder))
    for path in (*(release / "hellaswag").iterdir(), *(release / "boolq").iterdir()):
        shutil.copy(path, downloads / path.name)

    def download(manager: Any, urls: Any) -> Any:
        del manager
        if isinstance(urls, dict):
            return {name: tfds.core.Path(downloads / url.rsplit("/", 1)[1]) for name, url in urls.items()}
        return tfds.core.Path(downloads / urls.rsplit("/", 1)[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.download.DownloadManager, "download", download)
        made_up = (downloads / "socialiqa-train-dev.zip").read_bytes()
        patch.setattr(social_iqa, "SHA256", hashlib.sha256(made_up).hexdigest())
        for name in REASONING_TASKS:
            tfds_source.prepare(name, root)
    return root


def _contents(examples: Any) -> list[Example]:
    """Examples without ids (TFDS drops some) in an order of their own (TFDS shuffles)."""
    bare = [Example("", e.query, e.response, e.options, e.gold, e.contexts, e.option_lengths) for e in examples]
    return sorted(bare, key=repr)


def test_another_archive_than_the_published_one_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "socialiqa-train-dev.zip"
    archive.write_bytes(b"something else")
    with raises(DataError, archive.name, str(archive), code="sha256"):
        social_iqa.checked(archive)


@pytest.mark.parametrize("name", REASONING_TASKS)
def test_tasks_equal_those_from_files(name: str, release: Path, prepared: Path) -> None:
    ours: Task = tfds_source.load_tfds(prepared, [name])[name]
    theirs = load_reasoning(release, [name])[name]
    assert (ours.name, ours.descriptions, ours.seen) == (theirs.name, theirs.descriptions, theirs.seen)
    for split in ("train", "validation", "test"):
        assert _contents(getattr(ours, split)) == _contents(getattr(theirs, split)), split


def test_original_social_iqa_files_in_a_manual_dir(release: Path, tmp_path: Path) -> None:
    tfds_source.prepare("social_iqa", tmp_path, manual_dir=release / "social_iqa")
    source = tfds.data_source("social_iqa", split="validation", data_dir=tmp_path, download=False)
    assert len(source) == 24
    assert set(source[0]) == {"context", "question", "answerA", "answerB", "answerC", "label"}
    with raises(DataError, "train.jsonl", tmp_path):
        tfds_source.prepare("social_iqa", tmp_path / "other", manual_dir=tmp_path)


def test_social_iqa_archive_is_downloaded(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web = tmp_path / "web"
    shutil.make_archive(str(web / "socialiqa-train-dev"), "zip", release / "social_iqa")
    handler = functools.partial(_QuietHandler, directory=str(web))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/socialiqa-train-dev.zip"
        monkeypatch.setattr(social_iqa, "URL", url)
        made_up = (web / "socialiqa-train-dev.zip").read_bytes()
        monkeypatch.setattr(social_iqa, "SHA256", hashlib.sha256(made_up).hexdigest())
        tfds_source.prepare("social_iqa", tmp_path / "tfds")
        server.shutdown()
    task = tfds_source.load_tfds(tmp_path / "tfds", ["social_iqa"])["social_iqa"]
    assert _contents(task.test) == _contents(load_reasoning(release, ["social_iqa"])["social_iqa"].test)


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.mark.parametrize("name", REASONING_TASKS)
def test_what_is_not_prepared_is_named_with_the_command(name: str, tmp_path: Path) -> None:
    with raises(DataError, "data.tfds_dir", f"prepare({name!r}, {str(tmp_path)!r})", "--data.dir"):
        load_tasks([name], tfds_dir=tmp_path)


def test_directory_first_then_tfds(release: Path, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa").symlink_to(release / "piqa")
    tasks = load_tasks(["winogrande", "piqa"], tmp_path, tfds_dir=prepared)
    assert list(tasks) == ["winogrande", "piqa"]
    assert tasks["piqa"].test[0].id == "p100"
    with raises(DataError, "data.tasks", "'nope'", code="unknown"):
        tfds_source.load_tfds(prepared, ["nope"])


def test_no_tensorflow_is_imported(prepared: Path) -> None:
    program = (
        "import sys\n"
        "from lora_gen_jax.data.tfds_source import load_tfds\n"
        f"task = load_tfds({str(prepared)!r}, ['hellaswag'])['hellaswag']\n"
        "print(len(task.test), 'tensorflow' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert result.stdout.strip() == "24 False"
