"""One training, however it is spread: over the devices of a process, over processes, and from one spread to another."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import experiment, raises
from jax.experimental import multihost_utils
from jobs import ROOT, batches, largest_difference, metrics, saved

from lora_gen_jax.config import DistributedConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training import distributed
from lora_gen_jax.training.prepare import check_same_rows, shard_of

pytestmark = [pytest.mark.timeout(1800), pytest.mark.float64]
MESHES = {"data": ("--mesh.data", "4", "--mesh.model", "2"), "all": ("--mesh.fsdp", "2", "--mesh.model", "2")}


@pytest.fixture(scope="module")
def spread(jobs):
    """Six steps on eight devices, and by two processes with two devices each: work directories by name."""
    found = jobs.finish_all(*((jobs.config(name), flags) for name, flags in MESHES.items()), devices=8)
    # The frozen weights of two processes lie in pieces over both.
    pieces = jobs.finish_together(jobs.config("processes"), "--mesh.data", "1", "--mesh.fsdp", "4", devices=2)
    return dict(zip(MESHES, found, strict=True)) | {"processes": pieces}


@pytest.fixture(scope="module")
def resumed(jobs, spread):
    """Runs of `spread` that go on from step 3, on eight devices in other meshes or the same: {(before, mesh): …}."""
    pairs = [("processes", "all"), ("data", "all"), *((mesh, mesh) for mesh in MESHES)]
    runs = [(half(jobs, spread[before], f"{before}_then_{mesh}"), MESHES[mesh]) for before, mesh in pairs]
    found = dict(zip(pairs, jobs.finish_all(*runs, devices=8), strict=True))
    assert jobs.said(runs[0][0]).count("resuming at step 3") == len(pairs)
    return found


@pytest.fixture(scope="module")
def on_one_device(jobs, spread):
    """The same six steps on one device, and a run of eight that goes on there."""
    config = jobs.config("alone")
    alone, rest = jobs.finish_all((config, ()), (half(jobs, spread["all"], "all_then_one"), ()))
    assert jobs.said(config).count("resuming at step 3") == 1
    return alone, rest


@pytest.fixture(scope="module")
def alone(on_one_device):
    return on_one_device[0]


def half(jobs, whole: Path, name: str) -> Path:
    """The config of a copy of a run whose last three steps are not made yet."""
    config = jobs.config(name)
    shutil.copytree(whole, config.with_suffix(""))
    shutil.rmtree(config.with_suffix("") / "checkpoints" / "6")
    return config


# Six AdamW steps at 1e-2 in float64. Gradients are below 1 here and sums of a few hundred terms, off by 1e-15; AdamW
# divides by √v + 1e-8, so that where a gradient is zero but for rounding, a step moves a parameter by 1e-2·1e-15/1e-8.
CLOSE = 6 * 1e-2 * 1e-15 / 1e-8


def same_training(one: Path, other: Path) -> None:
    assert largest_difference(saved(one), saved(other)) <= CLOSE
    for name in ("loss", "cv", "grad_norm", "validation_loss"):
        steps, values = zip(*metrics(one, name), strict=True)
        others, found = zip(*metrics(other, name), strict=True)
        assert steps == others
        # A gradient's norm follows the parameters by the loss's curvature, which is below 100 here.
        np.testing.assert_allclose(found, values, rtol=0, atol=100 * CLOSE)


@pytest.mark.parametrize("how", ["data", "all", "processes"])
def test_however_a_batch_is_spread_the_training_is_the_same(alone, spread, how):
    same_training(alone, spread[how])
    assert [step for step, _ in metrics(spread[how])] == [1, 2, 3, 4, 5, 6]


def test_two_processes_take_each_a_part_of_a_batch(alone, spread, jobs):
    one, two = batches(jobs.root / "alone.py"), batches(jobs.root / "processes.py")
    assert [len(one[str(step)]) for step in range(1, 7)] == [1] * 6
    assert [len(two[str(step)]) for step in range(1, 7)] == [2] * 6
    # Process 1 writes nothing, and says nothing of its own.
    assert "step" not in jobs.said(jobs.root / "processes.py", "process1")
    assert "done:" in jobs.said(jobs.root / "processes.py", "process0")


@pytest.mark.parametrize("before", ["processes", "data"])
def test_a_run_goes_on_from_step_3_with_other_devices(alone, resumed, before):
    """From two processes to one, and from one mesh to another."""
    same_training(alone, resumed[before, "all"])


def test_a_run_of_eight_devices_goes_on_with_one(on_one_device):
    same_training(*on_one_device)


@pytest.mark.parametrize("mesh", sorted(MESHES))
def test_on_the_same_devices_a_run_goes_on_bit_for_bit(spread, resumed, mesh):
    """With weights and activations split over devices, too."""
    again = resumed[mesh, mesh]
    jax.tree.map(np.testing.assert_array_equal, saved(again), saved(spread[mesh]))
    for name in ("loss", "grad_norm", "validation_loss"):
        assert metrics(again, name) == metrics(spread[mesh], name)


def test_two_processes_evaluate_as_one_and_the_first_writes(spread, jobs):
    config, script = jobs.root / "processes.py", ROOT / "eval.py"
    flags = ("--methods", "base,lora_gen", "--eval.latency", "False", "--out")
    one = jobs.start(config, *flags, str(jobs.root / "one"), script=script, name="eval")
    assert one.wait(timeout=600) == 0, jobs.said(config, "eval")
    for i, process in enumerate(jobs.start_together(config, *flags, str(jobs.root / "two"), script=script)):
        assert process.wait(timeout=600) == 0, jobs.said(config, f"process{i}")
    alone, together = (json.loads((jobs.root / name / "results.json").read_text()) for name in ("one", "two"))
    assert together["methods"] == alone["methods"]
    assert "results:" in jobs.said(config, "process0")
    assert "results:" not in jobs.said(config, "process1")
    assert not (jobs.root / "processes" / ".unfinished").exists()


def test_a_process_needs_the_rows_of_its_own_devices_wherever_they_are(tmp_path, monkeypatch):
    """A mesh of a TPU pod follows its wires, not the numbers of the processes."""
    config = experiment(tmp_path, tmp_path / "run")
    rows = [[[0], [1]], [[1], [0]]]  # data 2, fsdp 2, model 1: one row each
    for process, expected in ((0, (0, 3)), (1, (1, 2))):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found = shard_of(config, SimpleNamespace(devices=_owned(rows), shape={"data": 2, "fsdp": 2, "model": 1}))
        assert found.rows == expected
        # Both processes share every row where `model` runs across them.
        across = SimpleNamespace(devices=_owned([[[0, 1]], [[0, 1]]]), shape={"data": 2, "fsdp": 1, "model": 2})
        assert shard_of(config, across).rows == (0, 1, 2, 3)


def _owned(owners):
    grid = np.empty(np.shape(owners), object)
    for place, owner in np.ndenumerate(np.array(owners)):
        grid[place] = SimpleNamespace(process_index=owner)
    return grid


def test_a_single_process_holds_all_rows(tmp_path):
    config = experiment(tmp_path, tmp_path / "run")
    assert shard_of(config, make_mesh()).rows == (0, 1, 2, 3)


SLURM = {"SLURM_STEP_NODELIST": "node[001-004]", "SLURM_NTASKS": "4"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, True),
        (POD, False),
        (POD | {"JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_ML_PLATFORM": "JAX"}, True),
    ],
)
def test_processes_are_looked_for_where_the_system_has_them(monkeypatch, environment, found):
    for name in ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX", "TPU_ML_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: started.append((args, kwargs)))
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    distributed.start(DistributedConfig())
    distributed.start(DistributedConfig(processes=1))
    assert [args for args, _ in started] == [(None, None, None)] * found
    assert all(kwargs["cluster_detection_method"] is None for _, kwargs in started)


def test_an_error_of_the_runtime_says_that_a_process_may_be_lost(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    lost = jax.errors.JaxRuntimeError("UNKNOWN: connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError) as raised, distributed.job(DistributedConfig(processes=1)):
        raise lost
    assert "start all of them again" in "".join(raised.value.__notes__)


def test_machines_with_other_task_files_are_named(monkeypatch):
    check_same_rows({"mine": "0123"})
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    gathered = []

    def allgather(digest):
        gathered.append(digest)
        return np.stack([digest, digest + np.uint32(len(gathered) > 1), digest])

    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    check_same_rows({"a": "0123", "b": "4567"})
    with raises(DataError, "data", "process 1", "data.files"):
        check_same_rows({"b": "4567", "a": "0123"})
    assert np.array_equal(*gathered)


@pytest.mark.parametrize(
    ("fields", "field", "facts"),
    [
        ({"coordinator": "host:1"}, "coordinator", ("distributed.processes", "distributed.process")),
        ({"processes": 2}, "coordinator", ("distributed.processes", "distributed.process")),
        ({"coordinator": "host", "processes": 2, "process": 0}, "coordinator", ("'host'", "HOST:PORT")),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "process", (2, 0, 1)),
        ({"heartbeat_seconds": 1}, "heartbeat_seconds", (1, 10)),
    ],
)
def test_flags_that_do_not_fit_together_are_named(tmp_path, fields, field, facts):
    config = experiment(tmp_path, tmp_path / "run")
    with raises(ConfigError, f"distributed.{field}", *facts):
        check(config.__class__(**{**vars(config), "distributed": DistributedConfig(**fields)}))
