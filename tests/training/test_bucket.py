"""Checkpoints in a bucket, on a server on this machine that speaks Google Cloud Storage's interface."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import before_jax
import jax
import numpy as np
import pytest
from bucket_server import BucketServer
from helpers import raises, unsaid
from jobs import ROOT, free_port, largest_difference, metrics, wait_for

from lora_gen_jax.config import Config
from lora_gen_jax.config_check import check
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.training.bucket import is_bucket, location
from lora_gen_jax.training.checkpoint import load_checkpoint
from lora_gen_jax.training.portable import load_portable

# In float64, as test_distributed compares trainings; `pack` stores float32.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.float64]


@pytest.fixture(scope="module")
def server():
    running = BucketServer("bucket")
    yield running
    running.close()


@pytest.fixture(scope="module")
def notes(server) -> dict[str, str]:
    """What a process needs in its environment to take the server for Google's."""
    return {
        "storage_emulator_host": server.address,
        "tensorstore_gcs_http_url": server.address,
        # No account is looked for.
        "no_gce_check": "true",
        "gcsfs_experimental_zb_hns_support": "false",
    }


@pytest.fixture(scope="module")
def alone(jobs):
    """Six steps with checkpoints in the work directory; compiled as users have it, as `lost` is."""
    with jobs.compiled_as_users():
        return jobs.finish(jobs.config("alone"))


def ended(jobs, process, config: Path, name: str = "job") -> str:
    assert process.wait(timeout=600) == 0, jobs.said(config, name)
    return jobs.said(config, name)


@pytest.fixture(scope="module")
def lost(jobs, server, notes, alone) -> Path:
    """A run whose machine is taken for lost after the first checkpoint, and which another ends: its config file."""
    with jobs.compiled_as_users():
        return _lost(jobs, server, notes)


def _lost(jobs, server, notes) -> Path:
    config, flags = jobs.config("first"), ("--bucket", "gs://bucket/first/")
    process = jobs.start(config, *flags, step_seconds=2, **notes)
    assert wait_for(lambda: "first/checkpoints/3/commit_success.txt" in server.objects, process), jobs.said(config)
    process.send_signal(signal.SIGSTOP)
    assert not (config.with_suffix("") / "checkpoints").exists()
    machine = jobs.root / "machine"
    said = ended(jobs, jobs.start(config, *flags, "--workdir", str(machine), name="next", **notes), config, "next")
    assert "resuming at step 3" in said
    assert "checkpoints into gs://bucket/first" in said
    assert [step for step, _ in metrics(machine)] == [4, 5, 6]
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=600) == 2
    found = re.search(r"another training \((.*), since .*\) writes to gs://bucket/first now, and", jobs.said(config))
    assert found is not None
    assert found[1].startswith(f"on {socket.gethostname()}, process ")
    return config


def packed(root: Path, notes: dict[str, str], checkpoint: str) -> dict[str, Any]:
    """What `pack` makes of a checkpoint in the bucket, in a process of its own."""
    out = root / f"packed-{len(list(root.glob('packed-*')))}"
    ran(notes, "pack", "--checkpoint", checkpoint, "--out", out, "--dtype", "float32")
    return load_portable(out)


def ran(notes: dict[str, str], *arguments: str | Path) -> str:
    """What a command prints, in a process of its own."""
    environment = os.environ | before_jax.COMPILE_QUICKLY | {"JAX_ENABLE_X64": "1"}
    environment |= {name.upper(): value for name, value in notes.items()}
    command = [sys.executable, "-m", "lora_gen_jax", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_a_machine_that_never_saw_the_run_ends_it_bit_for_bit(jobs, notes, alone, lost):
    one, other = load_checkpoint(alone), packed(jobs.root, notes, "gs://bucket/first")
    assert (one.step, other["step"]) == (6, 6)
    assert largest_difference(jax.tree.map(np.float32, one.variables), other["variables"]) == 0


def test_machines_that_share_nothing_but_the_bucket(jobs, notes, alone):
    config, coordinator = jobs.config("two"), f"127.0.0.1:{free_port()}"
    shared = ("--bucket", "gs://bucket/two", "--distributed.coordinator", coordinator, "--distributed.processes", "2")
    machines = [jobs.root / f"machine{i}" for i in range(2)]
    processes = [
        jobs.start(
            config,
            *(*shared, "--distributed.process", str(i), "--workdir", str(machine)),
            name=machine.name,
            **notes,
        )
        for i, machine in enumerate(machines)
    ]
    for process, machine in zip(processes, machines, strict=True):
        ended(jobs, process, config, machine.name)
    assert [step for step, _ in metrics(machines[0])] == [1, 2, 3, 4, 5, 6]
    assert not machines[1].exists()
    other = packed(jobs.root, notes, "gs://bucket/two/checkpoints")
    jax.tree.map(
        # Half the distance of float32 numbers, and what training differs by (`CLOSE` in test_distributed.py).
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2.0**-24, atol=6e-9),
        load_checkpoint(alone).variables,
        other["variables"],
    )


def test_another_config_is_refused_where_only_the_bucket_knows_the_first(jobs, notes, lost):
    elsewhere = ("--bucket", "gs://bucket/first", "--workdir", str(jobs.root / "elsewhere"), "--train.seed", "7")
    process = jobs.start(lost, *elsewhere, name="other", **notes)
    assert process.wait(timeout=600) == 2
    said = jobs.said(lost, "other")
    assert unsaid(said, ["gs://bucket/first", "--bucket", "train.seed: 0 -> 7"]) == []


def test_evaluation_finds_the_newest_complete_step(jobs, server, notes, lost):
    # As a step is that was being written when its machine was lost.
    del server.objects["first/checkpoints/6/commit_success.txt"]
    out, flags = jobs.root / "scored", ("--bucket", "gs://bucket/first", "--methods", "lora_gen")
    flags += ("--eval.latency", "False", "--out", str(out))
    ended(jobs, jobs.start(lost, *flags, script=ROOT / "eval.py", name="eval", **notes), lost, "eval")
    found = json.loads((out / "results.json").read_text())["checkpoints"]["lora_gen"]
    assert found["path"] == "gs://bucket/first/checkpoints/3"


def test_a_specialization_finds_its_generator_in_the_bucket_again(jobs, notes, lost):
    out = jobs.root / "special"
    ran(notes, "specialize", "--checkpoint", "gs://bucket/first", "--prompt", "say one two three", "--out", out)
    assert any('"gs://bucket/first/checkpoints/' in file.read_text() for file in out.glob("*.json"))
    # Its experts are in no generator that is shipped.
    asked = ("--input", "what kind is the sun ?", "--max-new-tokens", "2")
    ran(notes, "generate", "--specialization", out, "--trust-recorded", *asked)


def test_a_bucket_that_cannot_be_written_is_named(jobs, notes):
    config = jobs.config("absent")
    process = jobs.start(config, "--bucket", "gs://absent/run", **notes)
    assert process.wait(timeout=600) == 2
    said = jobs.said(config)
    assert "gs://absent/run/config.json cannot be written (" in said
    assert "Is there such a bucket, and may this machine write to it" in said
    assert "starting" not in said


def test_addresses(monkeypatch):
    assert [is_bucket(text) for text in ("gs://a/b", Path("gs://a/b"), "runs/a", "/gs:/a", "s3://a/b")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert location("runs/a") == Path("runs/a")
    assert str(location(Path("gs://a/b/"))) == "gs://a/b"
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gcsfs" else find(name))
    with raises(ConfigError, "gcsfs", "pip install gcsfs"):
        location("gs://a/b")


def test_places_in_a_config():
    config = Config(name="x", bucket="gs://a/b/")
    assert (config.saved, Config(name="x").saved) == ("gs://a/b/", Path("runs/x"))
    inside = config.inside("lora")
    assert (inside.workdir, inside.bucket) == (Path("runs/x/lora"), "gs://a/b/lora")
    assert Config(name="x").inside("lora").bucket is None
    for bucket in ("s3://a/b", "gs://a", "runs/a"):
        with raises(ConfigError, "bucket", repr(bucket), "gs://NAME/DIR"):
            check(Config(name="x", bucket=bucket))
    with raises(ConfigError, "workdir", "--bucket"):
        check(Config(name="x", workdir=Path("gs://a/b")))
