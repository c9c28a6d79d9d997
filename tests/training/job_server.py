"""Starts processes that have imported what a training job needs, in a fiftieth of the time that importing takes.

In: lines of JSON on standard input: {"command": [script, *arguments], "environment": {…}, "log": path}. Out: the number
of each process, a line each. A process is a copy of this one, made before JAX has a device or a thread. Its parent is
whoever is the next subreaper (`jobs.py`), not this process.
"""

import json
import os
import runpy
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import grain  # noqa: F401
import jax
import orbax.checkpoint  # noqa: F401
import tensorboardX  # noqa: F401
import transformers
from tokenizers import Tokenizer  # noqa: F401

from lora_gen_jax import cli, models  # noqa: F401
from lora_gen_jax.lab import comparison  # noqa: F401
from lora_gen_jax.training import loop  # noqa: F401

SWITCHES = ("jax_enable_x64", "jax_disable_most_optimizations")


def forked() -> int:
    """As `os.fork`. JAX warns of threads, of which it has none yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return os.fork()


def next_job() -> dict[str, Any] | None:
    """In the process of a job: what it is to run; in the server: None, when there is no more."""
    for line in sys.stdin:
        told, tell = os.pipe()
        between = forked()
        if not between:
            if job := forked():
                os.write(tell, b"%d" % job)
                os._exit(0)  # what it made gets another parent
            return json.loads(line)
        os.waitpid(between, 0)
        print(os.read(told, 99).decode(), flush=True)
        os.close(told)
        os.close(tell)
    return None


def become(job: dict[str, Any]) -> str:
    """Environment, arguments, output and JAX's settings of a process that was started with these; its script."""
    os.environ.clear()
    os.environ.update(job["environment"])
    log, nothing = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, place)
        os.set_inheritable(place, True)
    assert isinstance(sys.stdout, TextIOWrapper)
    sys.stdout.reconfigure(write_through=True)
    for name in SWITCHES:
        jax.config.update(name, os.environ.get(name.upper(), "0") == "1")
    jax.config.update("jax_default_matmul_precision", os.environ["JAX_DEFAULT_MATMUL_PRECISION"])
    sys.argv = job["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    return sys.argv[0]


if __name__ == "__main__":
    assert transformers.AutoTokenizer  # imported when it is asked for
    if (asked := next_job()) is not None:
        runpy.run_path(become(asked), run_name="__main__")
