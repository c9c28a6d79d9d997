"""Full and read-only disks end a command with one line and status 2, whatever libraries say of them."""

import errno
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from lora_gen_jax.cli import guarded
from lora_gen_jax.errors import OutputError
from lora_gen_jax.full_disk import disk_reason, told_once

FULL = os.strerror(errno.ENOSPC)


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
    """Hooks that stay for the end of a process end with the test."""
    for module, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    yield
    for name in ("absl", "asyncio"):
        logging.getLogger(name).filters.clear()


def full():
    raise OSError(errno.ENOSPC, FULL, "/there/file")


def in_the_background():
    """As the threads of other libraries do, with what they log of it."""
    thread = threading.Thread(target=full)
    thread.start()
    thread.join()
    try:
        full()
    except OSError:
        logging.getLogger("absl").exception("a save failed")
    logging.getLogger("asyncio").error("a future's exception was never retrieved")


def called_back_early():
    """As from a thread that Python does not know, before anything was told."""
    sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)
    in_the_background()


def closed():
    try:
        full()
    finally:
        raise ValueError("handle is closed")


def told():
    in_the_background()
    raise OutputError("output /there cannot be written", field="--out")


@pytest.mark.parametrize("run", [full, closed, in_the_background, called_back_early, told])
def test_one_line_is_all_that_is_said(capsys, run):
    with pytest.raises(SystemExit) as stop:
        guarded(run)
    assert stop.value.code == 2
    assert sys.unraisablehook is not sys.__unraisablehook__  # still there while Python ends
    threading.excepthook(threading.ExceptHookArgs((ValueError, ValueError("closed"), None, None)))
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1), err
    assert err.startswith("error: ")
    assert "/there" in err or FULL in err


def test_other_errors_are_shown_as_ever(monkeypatch, caplog):
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_type))
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    with told_once() as disk:
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        logging.getLogger("absl").error("something else")
    assert (disk.reason, shown, caplog.messages) == (None, [ZeroDivisionError], ["something else"])
    assert hooks == (sys.excepthook, threading.excepthook, sys.unraisablehook)
    assert logging.getLogger("absl").filters == []


def test_what_comes_long_after_a_full_disk_is_shown(monkeypatch, caplog):
    with told_once() as disk:
        logging.getLogger("absl").error(FULL)
        logging.getLogger("absl").error("what follows")
        later = time.monotonic() + 60
        monkeypatch.setattr(time, "monotonic", lambda: later)
        logging.getLogger("absl").error("something else")
        assert (disk.reason, caplog.messages) == (FULL, ["something else"])


def test_the_reason_is_found_in_what_libraries_make_of_it():
    for made in (
        ValueError(f"RESOURCE_EXHAUSTED: Error writing file: {FULL}"),
        OSError("12288 requested and 5584 written"),
        ExceptionGroup("several", [KeyError("a"), OSError(errno.ENOSPC, "")]),
    ):
        assert disk_reason(made) == FULL
    for other in (None, ValueError("RESOURCE_EXHAUSTED: Out of memory"), PermissionError(errno.EACCES, "a", "b")):
        assert disk_reason(other) is None


def run(script, **settings):
    return subprocess.run(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, timeout=600, check=False, **settings
    )


def test_an_output_that_takes_nothing_is_told_once():
    with open("/dev/full", "w") as output:
        done = run("from lora_gen_jax.cli import guarded; guarded(lambda: print('answer'))", stdout=output)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert FULL in done.stderr


def test_a_checkpoint_that_cannot_be_written_is_told_once(tmp_path):
    script = f"""
import resource, jax.numpy as jnp
from pathlib import Path
from types import SimpleNamespace
from lora_gen_jax.cli import guarded
from lora_gen_jax.training.checkpoint import Checkpoints
def run():
    checkpoints = Checkpoints(Path({str(tmp_path)!r}), 1)
    tree = {{str(i): jnp.arange(50_000.0) + i for i in range(8)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    state = SimpleNamespace(step=jnp.int32(1), variables={{"params": tree}}, opt_state=tree)
    checkpoints.save(state, {{"next_batch": 1}}, {{"step": 1}}, None)
    checkpoints.close()
guarded(run)
"""
    done = run(script, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "ERROR:" not in done.stderr
    assert len(said) == 1
    assert os.strerror(errno.EFBIG) in said[0]
