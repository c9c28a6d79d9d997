"""A generator as two files: what comes back, which one is found, and what damage says."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import raises, trained

from lora_gen_jax.errors import CheckpointError, OutputError
from lora_gen_jax.training import checkpoint, portable
from lora_gen_jax.training.checkpoint import find_checkpoint, load_checkpoint
from lora_gen_jax.training.portable import save_portable


@pytest.fixture(scope="module")
def loaded():
    return load_checkpoint(trained().directory)


def test_everything_comes_back(tmp_path, loaded):
    save_portable(loaded, tmp_path / "out", np.float32)
    again = load_checkpoint(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
    assert (again.step, again.fingerprints, again.versions) == (loaded.step, loaded.fingerprints, loaded.versions)
    # Where the run was is left out; where its models are is not.
    data = dataclasses.replace(loaded.config.data, files=())
    assert again.config == dataclasses.replace(loaded.config, workdir=None, data=data)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["generator.json", "generator.safetensors"]


def test_half_precision_rounds_parameters_and_no_statistics(tmp_path, loaded):
    save_portable(loaded, tmp_path / "out", ml_dtypes.bfloat16)
    again = load_checkpoint(tmp_path / "out").variables
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), loaded.variables)
    jax.tree.map(np.testing.assert_array_equal, again["params"], rounded["params"])
    jax.tree.map(np.testing.assert_array_equal, again["batch_stats"], loaded.variables["batch_stats"])
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(again))


def test_nothing_is_overwritten(tmp_path, loaded):
    (tmp_path / "mine").write_text("x")
    with raises(OutputError, "--out", tmp_path, code="exists"):
        save_portable(loaded, tmp_path, np.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", [portable.TENSORS, portable.READABLE])
def test_damage_is_named(tmp_path, loaded, name):
    save_portable(loaded, tmp_path / "out", np.float32)
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:40])
    with raises(CheckpointError, "--checkpoint", tmp_path / "out", code="damaged"):
        load_checkpoint(tmp_path / "out")


def test_the_named_one_is_found_before_the_runs_own_and_that_before_the_shipped_one(tmp_path, loaded, monkeypatch):
    save_portable(dataclasses.replace(loaded, step=1), tmp_path / "shipped", np.float32)
    save_portable(dataclasses.replace(loaded, step=2), tmp_path / "named", np.float32)
    monkeypatch.setattr(checkpoint, "SHIPPED", {"tiny": tmp_path / "shipped"})
    fresh = dataclasses.replace(trained(), workdir=tmp_path / "fresh")
    assert find_checkpoint(trained(), tmp_path / "named").step == 2
    assert find_checkpoint(trained()).step == loaded.step
    assert find_checkpoint(fresh).step == 1
    with raises(CheckpointError, "--checkpoint", tmp_path / "fresh", code="none"):
        find_checkpoint(dataclasses.replace(fresh, name="other"))
