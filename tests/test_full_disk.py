"""Full and read-only disks end a command with one line and status 2."""

import errno
import os
import subprocess
import sys

import pytest

from lora_gen_jax.cli import guarded


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_one_line_names_the_file_and_the_reason(capsys, number):
    def fail():
        raise OSError(number, os.strerror(number), "/there/file")

    with pytest.raises(SystemExit) as stop:
        guarded(fail)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"error: /there/file: {os.strerror(number)}\n")


def test_other_errors_are_shown_as_ever():
    for error in (ZeroDivisionError(), OSError(errno.EIO, "x")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)):
            guarded(fail)


def run(script, **settings):
    return subprocess.run(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, timeout=600, check=False, **settings
    )


def test_an_output_that_takes_nothing_is_told_once():
    with open("/dev/full", "w") as output:
        done = run("from lora_gen_jax.cli import guarded; guarded(lambda: print('answer'))", stdout=output)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert os.strerror(errno.ENOSPC) in done.stderr


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path):
    """What writes it in threads of its own may say more before."""
    script = f"""
import resource, jax.numpy as jnp
from pathlib import Path
from types import SimpleNamespace
from lora_gen_jax.cli import guarded
from lora_gen_jax.training.run_checkpoints import Checkpoints
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
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert f"a checkpoint in {tmp_path} cannot be written" in said
