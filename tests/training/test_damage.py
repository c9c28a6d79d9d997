"""Damaged checkpoints and generators: none is used silently; the step before is, and older ones without digests."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import experiment, raises
from safetensors.numpy import load_file, save_file

from lora_gen_jax.errors import CheckpointError, LoraGenError
from lora_gen_jax.training import portable
from lora_gen_jax.training.checkpoint import load_checkpoint, metadata_of
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.portable import save_portable
from lora_gen_jax.training.run_checkpoints import Checkpoints
from lora_gen_jax.training.step import TrainState
from lora_gen_jax.untrusted import digest_of, file_digest

FINGERPRINTS = {"cloud": "c" * 16, "edge": "e" * 16}


def state_at(step, optimizer):
    rng = np.random.default_rng(step)
    params = {"pool": {f"up_{x}": jnp.asarray(rng.standard_normal((4, 32, 8), np.float32)) for x in "ab"}}
    moments = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)) if x.ndim else x, optimizer.init(params)
    )
    return TrainState(jnp.asarray(step, jnp.int32), params, {}, moments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(config, optimizer, directory with the checkpoints of steps 1 and 2)."""
    root = tmp_path_factory.mktemp("run")
    config = experiment(root, root / "run")
    optimizer = make_optimizer(config.train)
    write(root / "checkpoints", config, optimizer)
    return config, optimizer, root / "checkpoints"


def write(directory, config, optimizer, steps=(1, 2)):
    checkpoints = Checkpoints(directory, keep=3)
    for step in steps:
        checkpoints.save(state_at(step, optimizer), {"taken": step}, metadata_of(config, FINGERPRINTS, {}, step), None)
    checkpoints.close()


def flip_array(step, item):
    """One bit in each file of an item's array data, where storage has no checksum of its own."""
    for path in (step / item).rglob("d/*"):
        stored = bytearray(path.read_bytes())
        stored[len(stored) // 2] ^= 4
        path.write_bytes(bytes(stored))


def restored(directory, optimizer):
    checkpoints = Checkpoints(directory, keep=3)
    try:
        return checkpoints.restore(state_at(0, optimizer))
    finally:
        checkpoints.close()


def same(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_a_flipped_bit_in_the_arrays_is_named_and_the_step_before_is_offered(saved, tmp_path):
    shutil.copytree(saved[2], tmp_path / "run")
    flip_array(tmp_path / "run" / "2", "generator")
    with raises(CheckpointError, "--checkpoint", tmp_path / "run" / "2", tmp_path / "run" / "1", code="damaged"):
        load_checkpoint(tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "1").step == 1


@pytest.mark.parametrize("item", ["generator", "optimizer"])
def test_a_run_goes_on_from_the_step_before_and_sets_the_damaged_one_aside(saved, tmp_path, caplog, item):
    _, optimizer, directory = saved
    shutil.copytree(directory, tmp_path / "run")
    flip_array(tmp_path / "run" / "2", item)
    state, place = restored(tmp_path / "run", optimizer)
    same(state, state_at(1, optimizer))
    assert place == {"taken": 1}
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"1", "2.damaged"}
    assert any(record.levelname == "WARNING" and "2.damaged" in record.getMessage() for record in caplog.records)
    write(tmp_path / "run", saved[0], optimizer, steps=(2,))  # the step can be written again
    same(restored(tmp_path / "run", optimizer)[0], state_at(2, optimizer))


def test_a_list_of_the_storage_that_is_nested_without_end_is_named(saved, tmp_path):
    _, optimizer, directory = saved
    shutil.copytree(directory, tmp_path / "run")
    (tmp_path / "run" / "2" / "_CHECKPOINT_METADATA").write_text('{"item_handlers": ' + "[" * 5000)
    with raises(CheckpointError, "checkpoint", tmp_path / "run", code="damaged"):
        restored(tmp_path / "run", optimizer)


def test_where_every_checkpoint_is_damaged_none_is_moved(saved, tmp_path):
    _, optimizer, directory = saved
    shutil.copytree(directory, tmp_path / "run")
    for step in "12":
        flip_array(tmp_path / "run" / step, "optimizer")
    with raises(CheckpointError, "checkpoint", tmp_path / "run" / "2", code="damaged"):
        restored(tmp_path / "run", optimizer)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"1", "2"}


@pytest.mark.parametrize("field", ["step", "config", "fingerprints"])
def test_changed_metadata_are_noticed(saved, tmp_path, field):
    shutil.copytree(saved[2] / "2", tmp_path / "2")
    path = tmp_path / "2" / "metadata" / "metadata"
    values = json.loads(path.read_text())
    values[field] = {"step": 3, "config": {}, "fingerprints": {"cloud": "x", "edge": "y"}}[field]
    path.write_text(json.dumps(values))
    with raises(CheckpointError, "--checkpoint", tmp_path / "2", code="damaged"):
        load_checkpoint(tmp_path / "2")


def test_a_checkpoint_of_a_version_without_digests_is_read(saved, tmp_path):
    _, optimizer, directory = saved
    shutil.copytree(directory, tmp_path / "run")
    for path in (tmp_path / "run").glob("*/metadata/metadata"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in values.items() if not k.startswith("sha256")}))
    assert load_checkpoint(tmp_path / "run").step == 2
    same(restored(tmp_path / "run", optimizer)[0], state_at(2, optimizer))


def generator(saved, tmp_path, change=None, seal=True, **fields):
    """A portable generator whose tensors and fields a test has changed, as its author would."""
    out = tmp_path / "out"
    save_portable(load_checkpoint(saved[2]), out, np.float32)
    if change is not None:
        tensors = load_file(out / portable.TENSORS)
        save_file(change(tensors), out / portable.TENSORS)
    path = out / portable.READABLE
    values = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"} | fields
    digests = {portable.TENSORS: file_digest(out / portable.TENSORS), portable.READABLE: digest_of(values)}
    path.write_text(json.dumps(values | ({"sha256": digests} if seal else {})))
    return out


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "params/pool/up_a": t["params/pool/up_a"] * np.float32(np.nan)},
        lambda t: {**t, "params/pool/up_a": t["params/pool/up_a"] * np.float32(np.inf)},
        lambda t: {**t, "params/pool/up_a": t["params/pool/up_a"].astype(np.int32)},
        lambda t: {**t, "params/pool/up_a/x": np.ones(1, np.float32)},
        lambda t: {**t, "params/direct/x": np.ones(1, np.float32)},
        lambda t: {**t, "params": np.ones(1, np.float32)},
        lambda t: {**t, "": np.ones(1, np.float32)},
        lambda t: {"params/x": np.ones(1, np.float32)},
        lambda t: {"params/pool": np.ones(1, np.float32)},
        lambda t: {},
    ],
)
def test_tensors_that_no_generator_has_are_refused(saved, tmp_path, change, seal):
    out = generator(saved, tmp_path, change, seal)
    with raises(CheckpointError, "--checkpoint", out, code="damaged"):
        load_checkpoint(out)


DEEP = json.loads("[" * 100 + "]" * 100)


@pytest.mark.parametrize(
    "fields",
    [
        {"step": "1"},
        {"step": -1},
        {"step": DEEP},
        {"fingerprints": ["c"]},
        {"fingerprints": {"cloud": 1}},
        {"versions": None},
        {"config": []},
        {"config": {"method": 3}},
        {"config": {"method": "none such"}},
        {"config": {"generator": 1}},
        {"config": {"generator": {"num_experts": "four"}}},
        {"config": {"generator": {"num_experts": 0}}},
        {"config": {"data": {"files": {"a": 1}}}},
        {"config": {"eval": {"refine": {"kind": ["gates"]}}}},
        {"config": {"train": {"steps": 1e999}}},
        {"sha256": {"generator.json": 5}},
    ],
)
def test_fields_that_no_generator_has_are_refused(saved, tmp_path, fields):
    out = generator(saved, tmp_path, **fields)
    with raises(CheckpointError, "--checkpoint", out, code="damaged"):
        load_checkpoint(out)


def test_a_changed_field_is_noticed_by_the_digest_and_a_generator_without_one_is_read(saved, tmp_path):
    out = generator(saved, tmp_path)
    path = out / portable.READABLE
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"step": 7}))
    with raises(CheckpointError, "--checkpoint", out, code="damaged"):
        load_checkpoint(out)
    del values["sha256"]
    path.write_text(json.dumps(values))
    assert load_checkpoint(out).step == 2


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"name": 3}', '{"train": []}', "[" * 100_000, '{"x": ' * 90 + "1" + "}" * 90]
)
def test_a_runs_config_that_is_malformed_is_named(saved, tmp_path, text):
    from lora_gen_jax.training.prepare import prepare_directory

    config = dataclasses.replace(saved[0], workdir=tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LoraGenError) as found:
        prepare_directory(config)
    assert type(found.value) is CheckpointError
    assert found.value.field == "config.json"
