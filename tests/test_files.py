"""Output directories: complete or not at all, never in the place of what they cannot replace, and errors in words."""

import errno
import os
from pathlib import Path

import pytest
from helpers import raises

from lora_gen_jax.errors import OutputError
from lora_gen_jax.files import complete_directory, sync, write_text


def fill(path):
    with complete_directory(path) as temporary:
        (temporary / "made").write_text("x")
    return sorted(p.name for p in path.iterdir())


def test_a_new_and_an_empty_directory_are_filled_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    assert fill(tmp_path / "empty") == fill(tmp_path / "far" / "new") == ["made"]
    with raises(OutputError, "--out", tmp_path / "empty", code="exists"):
        fill(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["link", "dangling", "here", "dot"])
def test_what_cannot_be_replaced_is_refused_before_any_work(tmp_path, monkeypatch, kind):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "there")
    path = {"here": tmp_path / "there", "dot": Path()}.get(kind, tmp_path / kind)
    with raises(OutputError, "--out", path, code="not replaceable"), complete_directory(path):
        pytest.fail("the work began")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with raises(OutputError, "--out", tmp_path, code="not replaceable"):
        fill(tmp_path)


def test_what_fails_at_the_end_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with raises(OutputError, "--out", tmp_path / "out", "No space left on device", code="unwritable"):
        fill(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [fill, lambda path: write_text(path, "x")], ids=["directory", "file"])
def test_what_is_written_is_on_the_disk_before_it_has_its_name_and_the_name_is_then(tmp_path, monkeypatch, write):
    done, rename, replace = [], Path.rename, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(Path, "rename", lambda self, to: done.append("named") or rename(self, to))
    monkeypatch.setattr(Path, "replace", lambda self, to: done.append("named") or replace(self, to))
    write(tmp_path / "out")
    before, after = done[: done.index("named")], done[done.index("named") + 1 :]
    assert before
    assert all(Path(name).parent == tmp_path or Path(name).parent.parent == tmp_path for name in before)
    assert after == [str(tmp_path)]


def test_a_file_system_that_does_not_sync_directories_is_used(tmp_path, monkeypatch):
    def unknown(file):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unknown)
    sync(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="Invalid"):
        sync(tmp_path / "file")


def test_a_handler_that_fails_hides_nothing(tmp_path, monkeypatch):
    def failing(number):
        def fail(self, *args, **kwargs):
            raise OSError(number, os.strerror(number))

        return fail

    monkeypatch.setattr(Path, "write_text", failing(errno.ENOSPC))
    monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
    with raises(OutputError, "--out", os.strerror(errno.ENOSPC), code="unwritable"):
        write_text(tmp_path / "out", "x")
