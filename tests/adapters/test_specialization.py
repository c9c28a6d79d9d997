"""A specialisation on disk: small, complete or absent, bound to its pool, and the same adapter when read again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from helpers import CLOUD, EDGE, SETTINGS, generator_variables, prompts_of, random_params, token_rows

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.adapters.specialization import (
    TENSORS,
    Specialization,
    adapter_of,
    load_specialization,
    pool_fingerprint,
    save_specialization,
    sparse_tensors,
)
from lora_gen_jax.errors import CheckpointError, OutputError
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.generator.specialize import specialize

FINGERPRINTS = {"cloud": "c" * 16, "edge": "e" * 16, "pool": "p" * 16}
VERSIONS = dict.fromkeys(("lora_gen_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers"), "10.20.30")


def synthetic(layers=30, experts=8, k=2, prompt="Answer.\n"):
    rng = np.random.default_rng(0)
    index = np.stack([rng.permutation(experts)[:k] for _ in range(layers)]).astype(np.uint8)
    weight = rng.random((layers, k)).astype(np.float32)
    return Specialization({"index": index, "weight": weight}, FINGERPRINTS, prompt, "runs/x/checkpoints/60", VERSIONS)


def test_thirty_layers_of_two_gates_take_less_than_two_kilobytes(tmp_path):
    save_specialization(synthetic(prompt="A long prompt. " * 1000), tmp_path / "s")
    assert (tmp_path / "s" / TENSORS).stat().st_size < 2048
    assert {p.name for p in (tmp_path / "s").iterdir()} == {TENSORS, "prompt.txt", "specialization.json"}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    saved = synthetic(prompt="Zeile eins\nzwei – “drei”\n")
    save_specialization(saved, tmp_path / "s")
    loaded = load_specialization(tmp_path / "s")
    for name, value in saved.tensors.items():
        np.testing.assert_array_equal(loaded.tensors[name], value)
        assert loaded.tensors[name].dtype == value.dtype
    for field in ("fingerprints", "prompt", "checkpoint", "versions"):
        assert getattr(loaded, field) == getattr(saved, field)
    readable = json.loads((tmp_path / "s" / "specialization.json").read_text())
    pairs = zip(saved.tensors["index"][0], saved.tensors["weight"][0], strict=True)
    assert readable["gates"][0] == {str(e): pytest.approx(float(w), abs=1e-6) for e, w in pairs}
    with safetensors.safe_open(tmp_path / "s" / TENSORS, "numpy") as file:
        assert {"cloud", "edge", "pool", "prompt", "versions"} <= set(file.metadata())


def test_a_prompt_with_carriage_returns_comes_back_as_it_was(tmp_path):
    save_specialization(synthetic(prompt="one\r\ntwo\r"), tmp_path / "s")
    assert load_specialization(tmp_path / "s").prompt == "one\r\ntwo\r"


@pytest.fixture(scope="module")
def made():
    """(settings, variables, what the generator says about one prompt) of each variant."""
    frozen, cache = random_params(CLOUD, seed=2), {}
    variants = {
        "shared": {},
        "per_layer": {"pool": "per_layer"},
        "factors": {"mix": "factors"},
        "gumbel": {"routing": "gumbel"},
        "direct": {"generator": "direct"},
    }

    def get(name):
        if name not in cache:
            settings = dataclasses.replace(SETTINGS, **variants[name])
            generator = LoRAGen(CLOUD, EDGE, settings)
            variables = generator_variables(generator, frozen, prompts_of([4], 1, 16))
            prompts = token_rows([7], CLOUD.vocab_size)
            cache[name] = settings, variables, specialize(generator, variables, frozen, prompts)
        return cache[name]

    return get


@pytest.mark.parametrize("name", ["shared", "per_layer", "factors", "gumbel", "direct"])
def test_an_adapter_read_from_disk_merges_to_the_same_bits(made, tmp_path, name):
    settings, variables, generated = made(name)
    fingerprints = {**FINGERPRINTS, "pool": pool_fingerprint(variables)}
    saved = Specialization(sparse_tensors(generated, settings), fingerprints, "x", None, VERSIONS)
    save_specialization(saved, tmp_path / "s")
    loaded = load_specialization(tmp_path / "s")
    assert loaded.direct == (name == "direct")
    adapter, params = adapter_of(loaded, variables, settings), random_params(EDGE)
    one, other = merge(params, adapter), merge(params, generated.adapter.select(0))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert np.any(one["layers"]["ffn"]["up"]["kernel"] != params["layers"]["ffn"]["up"]["kernel"])
    if name == "direct":
        assert set(loaded.tensors) == {f"{site}.{x}" for site in EDGE.ffn_sites for x in "ab"}
    else:
        assert loaded.tensors["index"].shape == (EDGE.num_layers, settings.active_experts)


def test_a_specialisation_of_another_pool_is_refused(made):
    settings, variables, generated = made("shared")
    fingerprints = {**FINGERPRINTS, "pool": pool_fingerprint(variables)}
    special = Specialization(sparse_tensors(generated, settings), fingerprints, "x", None, VERSIONS)
    pool = {**variables["params"]["pool"]}
    pool["up_b"] = pool["up_b"].at[0, 0, 0].add(1e-3)
    other = {**variables, "params": {**variables["params"], "pool": pool}}
    found = pool_fingerprint(other)
    message = rf"another expert pool \(fingerprint {fingerprints['pool']}, this generator's pool is {found}\)"
    with pytest.raises(CheckpointError, match=message):
        adapter_of(special, other, settings)


def test_the_pools_fingerprint_depends_on_every_leaf_and_on_nothing_else(made):
    _, variables, _ = made("shared")
    pool = variables["params"]["pool"]
    prints = {pool_fingerprint(variables)}
    for name in pool:
        changed = {**pool, name: pool[name] + jnp.float32(1e-3)}
        prints.add(pool_fingerprint({"params": {"pool": changed}}))
    assert len(prints) == 1 + len(pool)
    assert pool_fingerprint({"params": {"pool": dict(reversed(pool.items()))}}) == pool_fingerprint(variables)
    assert pool_fingerprint({"params": {}}) == "none"


def test_a_directory_that_holds_something_is_left_as_it_is(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already: choose another --out, or remove it first"):
        save_specialization(synthetic(), tmp_path / "s")
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="exists already"):
        save_specialization(synthetic(), tmp_path / "file")
    assert {p.name for p in tmp_path.iterdir()} == {"s", "file"}


def test_an_empty_directory_may_be_used_and_missing_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    save_specialization(synthetic(), tmp_path / "empty")
    save_specialization(synthetic(), tmp_path / "a" / "b")
    assert load_specialization(tmp_path / "a" / "b").prompt == load_specialization(tmp_path / "empty").prompt


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    broken = dataclasses.replace(synthetic(), versions={"jax": object()})
    with pytest.raises(TypeError):
        save_specialization(broken, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_an_output_whose_parent_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        save_specialization(synthetic(), tmp_path / "file" / "s")


def test_what_is_no_specialisation_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no specialisation \(no specialization\.safetensors\)"):
        load_specialization(tmp_path)


@pytest.mark.parametrize("name", [TENSORS, "prompt.txt", "specialization.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "list"])
def test_a_damaged_specialisation_is_named(tmp_path, name, damage):
    save_specialization(synthetic(prompt="aéé"), tmp_path / "s")
    path = tmp_path / "s" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"[]" if damage == "list" else path.read_bytes()[: -9 if name != "prompt.txt" else -1])
    if (name, damage) == ("prompt.txt", "list"):
        assert load_specialization(tmp_path / "s").prompt == "[]"
        return
    with pytest.raises(CheckpointError, match=r"is damaged|is no specialisation") as error:
        load_specialization(tmp_path / "s")
    assert str(tmp_path / "s") in str(error.value)
