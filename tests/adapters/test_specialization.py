"""A specialization on disk: small, complete or absent, bound to its pool, and the same adapter when read again."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import CLOUD, EDGE, SETTINGS, generator_variables, prompts_of, raises, random_params, token_rows

from lora_gen_jax.adapters.lora import PromptLoRA
from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.adapters.specialization import (
    TENSORS,
    Specialization,
    gate_tensors,
    load_specialization,
    save_specialization,
    save_specializations,
    sparse_tensors,
)
from lora_gen_jax.adapters.specialization_check import LARGEST
from lora_gen_jax.adapters.specialization_fit import adapter_of, pool_fingerprint
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import CheckpointError, OutputError
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.generator.router import Gates, keep_top_k
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.generator.trained_module import Generated
from lora_gen_jax.untrusted import file_digest

FINGERPRINTS = {"cloud": "c" * 16, "edge": "e" * 16, "pool": "p" * 16}
VERSIONS: dict[str, str] = dict.fromkeys(
    ("lora_gen_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers"), "10.20.30"
)


def synthetic(layers=30, experts=8, k=2, prompt="Answer.\n"):
    rng = np.random.default_rng(0)
    index = np.stack([rng.permutation(experts)[:k] for _ in range(layers)]).astype(np.uint8)
    weight = rng.random((layers, k)).astype(np.float32)
    weight = weight / weight.sum(axis=1, keepdims=True) if k > 1 else weight
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


def dense(layers=30, experts=64):
    """Signed gates of all experts, as linear routing has them."""
    gates_LE = np.random.default_rng(1).standard_normal((layers, experts)).astype(np.float32)
    gates_LE[2] = 0
    tensors = gate_tensors(Gates.of_all(gates_LE), dataclasses.replace(SETTINGS, routing="linear", num_experts=experts))
    return gates_LE, Specialization(tensors, FINGERPRINTS, "Answer.", None, VERSIONS)


REFINED = {"kind": "gates", "examples": 5, "steps": 10, "loss_before": 2.34567, "loss_after": 1.23456}


def test_refined_gates_take_less_than_two_kilobytes_and_say_how_they_were_refined(tmp_path):
    saved = dataclasses.replace(synthetic(), refined=REFINED)
    save_specialization(saved, tmp_path / "s")
    assert (tmp_path / "s" / TENSORS).stat().st_size < 2048
    assert load_specialization(tmp_path / "s").refined == REFINED
    assert json.loads((tmp_path / "s" / "specialization.json").read_text())["refined"] == REFINED
    save_specialization(synthetic(), tmp_path / "read")
    assert load_specialization(tmp_path / "read").refined is None
    assert "refined" not in json.loads((tmp_path / "read" / "specialization.json").read_text())


def test_signed_gates_come_back_to_half_a_step_of_eight_bits(tmp_path):
    gates_LE, saved = dense()
    save_specialization(saved, tmp_path / "s")
    loaded = load_specialization(tmp_path / "s")
    assert (loaded.dense, loaded.direct, loaded.active) == (True, False, 64)
    assert (tmp_path / "s" / TENSORS).stat().st_size < 30 * 64 + 1024
    found = loaded.gates(64).dense()
    # 127 steps from 0 to a layer's largest gate, either way; the product itself is rounded once more.
    half = np.abs(gates_LE).max(axis=1, keepdims=True) / 254
    assert np.all(np.abs(found - gates_LE) <= half * (1 + 1e-5))
    assert np.any(found < 0)
    np.testing.assert_array_equal(found[2], 0)
    np.testing.assert_array_equal(
        gate_tensors(Gates.of_all(found), dataclasses.replace(SETTINGS, routing="linear"))["weight"],
        saved.tensors["weight"],
    )
    first = json.loads((tmp_path / "s" / "specialization.json").read_text())["gates"][0]
    largest = np.argsort(-np.abs(found[0]), kind="stable")[:8]
    assert first == {str(e): pytest.approx(float(found[0, e]), abs=1e-6) for e in largest}
    with raises(CheckpointError, key("weight"), 64, 32):
        loaded.gates(32)


def test_factors_beside_gates_come_back_and_fit_the_same_weights(made, tmp_path):
    settings, variables, generated = made("shared")
    rng = np.random.default_rng(0)
    factors = {
        f"{site}.{x}": rng.standard_normal((EDGE.num_layers, *shape), np.float32)
        for site, (inputs, outputs) in EDGE.ffn_shapes.items()
        for x, shape in (("a", (inputs, 2)), ("b", (2, outputs)))
    }
    fingerprints = {**FINGERPRINTS, "pool": pool_fingerprint(variables)}
    tensors = {**sparse_tensors(generated, settings), **factors}
    saved = Specialization(tensors, fingerprints, "x", None, VERSIONS, REFINED)
    save_specialization(saved, tmp_path / "s")
    loaded = load_specialization(tmp_path / "s")
    assert not loaded.direct
    params = random_params(EDGE)
    merged = merge(params, adapter_of(loaded, variables, settings))
    plain = merge(params, generated.adapter.select(0))
    for site in EDGE.ffn_sites:
        delta = np.einsum("lix,lxo->lio", factors[f"{site}.a"], factors[f"{site}.b"])
        both = plain["layers"]["ffn"][site]["kernel"] + delta
        # One rounding more than the sum at once: of numbers up to 10, a millionth.
        np.testing.assert_allclose(merged["layers"]["ffn"][site]["kernel"], both, atol=1e-5)
    for change, site, fact in (
        ({"up.a": factors["up.a"][:, :9]}, "up", "(9, 2)"),
        ({"q.a": factors["up.a"], "q.b": factors["up.b"]}, "q", "(16, 2)"),
        ({"up.b": factors["up.b"][:, :1]}, "up", "(1, 24)"),
    ):
        with raises(CheckpointError, key(site), fact):
            adapter_of(dataclasses.replace(saved, tensors={**tensors, **change}), variables, settings)


def test_signed_gates_and_a_choice_are_not_taken_for_each_other(made):
    settings, variables, generated = made("shared")
    fingerprints = {**FINGERPRINTS, "pool": pool_fingerprint(variables)}
    signed = dataclasses.replace(settings, routing="linear")
    for stored, asked in ((signed, settings), (settings, signed)):
        one = Specialization(sparse_tensors(generated, stored), fingerprints, "x", None, VERSIONS)
        with raises(CheckpointError, TENSORS, "signed gates", "a choice"):
            adapter_of(one, variables, asked)


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
        "linear": {"routing": "linear"},
        "direct": {"generator": "direct"},
    }

    def get(name):
        if name not in cache:
            settings = dataclasses.replace(SETTINGS, **variants[name])
            generator = LoRAGen(Decoder(CLOUD), EDGE, settings)
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


def test_a_specialization_of_another_pool_is_refused(made):
    settings, variables, generated = made("shared")
    fingerprints = {**FINGERPRINTS, "pool": pool_fingerprint(variables)}
    special = Specialization(sparse_tensors(generated, settings), fingerprints, "x", None, VERSIONS)
    pool = {**variables["params"]["pool"]}
    pool["up_b"] = pool["up_b"].at[0, 0, 0].add(1e-3)
    other = {**variables, "params": {**variables["params"], "pool": pool}}
    found = pool_fingerprint(other)
    with raises(CheckpointError, key("pool"), fingerprints["pool"], found):
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
    _, direct, _ = made("direct")
    other = jax.tree.map(lambda x: x + jnp.float32(1e-3), direct["params"]["direct"])
    assert pool_fingerprint(direct) != pool_fingerprint({"params": {"direct": other}})


def test_a_directory_that_holds_something_is_left_as_it_is(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("mine")
    with raises(OutputError, "--out", tmp_path / "s"):
        save_specialization(synthetic(), tmp_path / "s")
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("x")
    with raises(OutputError, "--out", tmp_path / "file"):
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
    with raises(OutputError, "--out", tmp_path / "file" / "s", code="unwritable"):
        save_specialization(synthetic(), tmp_path / "file" / "s")


def test_what_is_no_specialization_is_named(tmp_path):
    with raises(CheckpointError, TENSORS, tmp_path):
        load_specialization(tmp_path)


@pytest.mark.parametrize("name", [TENSORS, "prompt.txt", "specialization.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "list"])
def test_a_damaged_specialization_is_named(tmp_path, name, damage):
    save_specialization(synthetic(prompt="aéé"), tmp_path / "s")
    path = tmp_path / "s" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"[]" if damage == "list" else path.read_bytes()[: -9 if name != "prompt.txt" else -1])
    with raises(CheckpointError, "prompt.txt:sha256" if (name, damage) == ("prompt.txt", "list") else name) as error:
        load_specialization(tmp_path / "s")
    assert str(tmp_path / "s") in str(error.value)


@pytest.fixture
def tampered(tmp_path):
    """Loads a good specialization whose tensors, metadata or readable fields a test has changed."""

    def load(k=2, metadata=None, readable=None, **tensors):
        directory = tmp_path / "s"
        save_specialization(synthetic(layers=3, k=k), directory)
        with safetensors.safe_open(directory / TENSORS, "numpy") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            known = file.metadata()
        changed = {name: value for name, value in {**kept, **tensors}.items() if value is not None}
        (directory / TENSORS).write_bytes(safetensors.numpy.save(changed, {**known, **(metadata or {})}))
        path = directory / "specialization.json"
        sealed = {"sha256": {TENSORS: file_digest(directory / TENSORS)}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **sealed, **(readable or {})}))
        return load_specialization(directory)

    return load


def two(*rows, dtype: Any = np.float32):
    """[3, K] whose first layer is as given, the others good."""
    good = [0.75, 0.25] if np.issubdtype(dtype, np.floating) else [0, 1]
    return np.array([*rows, *[good] * (3 - len(rows))], dtype)


def key(name):
    """The field of an error about an entry of the tensors' file."""
    return f"{TENSORS}:{name}"


@pytest.mark.parametrize(
    ("change", "field", "fact"),
    [
        ({"weight": two([np.nan, 1.0])}, key("weight.0"), "[nan, 1.0]"),
        ({"weight": two([0.5, 0.5], [np.inf, -np.inf])}, key("weight.1"), "[inf, -inf]"),
        ({"weight": two([1.25, -0.25])}, key("weight.0"), "[1.25, -0.25]"),
        ({"weight": two([0.75, 0.25], [0.5, 0.25])}, key("sum of weight.1"), "[0.5, 0.25]"),
        ({"weight": two([0.0, 0.0])}, key("sum of weight.0"), "[0.0, 0.0]"),
        ({"index": two([3, 3], dtype=np.uint8)}, key("index.0"), "[3, 3]"),
        ({"weight": np.ones((3, 3), np.float32) / 3}, key("weight"), "(3, 2), (3, 3)"),
        ({"weight": np.ones(3, np.float32)}, key("weight"), "(3,)"),
        ({"weight": np.ones((0, 2), np.float32), "index": np.ones((0, 2), np.uint8)}, key("index"), "(0, 2)"),
        ({"index": two([0, 1], dtype=np.int32)}, key("index"), "I32"),
        ({"index": two([0.0, 1.0])}, key("index"), "F32"),
        ({"weight": two([1, 0], dtype=np.uint8)}, key("weight"), "U8"),
        ({"weight": None}, TENSORS, "weight"),
        ({"weight": None, "index": None}, TENSORS, "index"),
        ({"weight": None, "index": None, "up.c": two()}, TENSORS, "index"),
        ({"weight": None, "index": None, "up.a": two()}, key("up.a"), "(3, 2)"),
        ({"weight": None, "index": None, "up.a": np.ones((2, 3, 1)), "up.b": np.ones((2, 1, 3))}, key("up.a"), "F64"),
        ({"up.a": np.ones((3, 3, 1), np.float32)}, TENSORS, "index, up.a, weight"),
        ({"k": 1, "weight": np.array([[1.0], [0.0], [1.0]], np.float32)}, key("weight.1"), "[0.0]"),
        ({"k": 1, "weight": np.array([[1.5], [0.5], [1.0]], np.float32)}, key("weight.0"), "[1.5]"),
        ({"metadata": {"prompt": "0" * 16}}, "prompt.txt:sha256", "0" * 16),
        ({"metadata": {"refined": "{}"}}, key("refined"), "kind"),
        (
            {"up.a": np.ones((3, 3, 1), np.float32), "up.b": np.ones((2, 1, 3), np.float32)},
            "layers",
            "numbers of layers",
        ),
        ({"index": None, "scale": np.ones(3, np.float32)}, key("weight"), "F32"),
        (
            {"index": None, "weight": np.ones((3, 4), np.int8), "scale": np.full(3, np.nan, np.float32)},
            key("scale"),
            "not numbers",
        ),
        (
            {"index": None, "weight": np.ones((3, 4), np.int8), "scale": np.ones((3, 1), np.float32)},
            key("scale"),
            "(3, 1)",
        ),
        ({"readable": {"checkpoint": 3}}, "specialization.json:checkpoint", 3),
        ({"readable": {"versions": ["x"]}}, "specialization.json:versions", "versions"),
        ({"readable": {"versions": {"jax": 1}}}, "specialization.json:versions", "versions"),
    ],
)
def test_contents_that_no_generator_makes_are_refused(tampered, tmp_path, change, field, fact):
    with raises(CheckpointError, field, tmp_path / "s", fact):
        tampered(**change)


def test_factors_of_different_depth_are_refused(tampered):
    gone, factors = {"weight": None, "index": None}, {"up.a": np.ones((2, 3, 1), np.float32)}
    with raises(CheckpointError, "layers"):
        tampered(**gone, **factors, **{"up.b": np.ones((3, 1, 3), np.float32)})


def test_a_factor_that_is_no_number_is_refused(tampered):
    factors = {"up.a": np.full((2, 3, 1), np.inf, np.float32), "up.b": np.ones((2, 1, 3), np.float32)}
    with raises(CheckpointError, key("up.a")):
        tampered(weight=None, index=None, **factors)


def test_a_good_file_with_one_gate_a_layer_is_loaded(tampered):
    weight = np.array([[0.3], [1.0], [0.9]], np.float32)
    np.testing.assert_array_equal(tampered(k=1, weight=weight).tensors["weight"], weight)


def test_a_flipped_bit_that_leaves_the_gates_plausible_is_noticed_and_older_files_are_read(tmp_path):
    save_specialization(synthetic(), tmp_path / "s")
    path, readable = tmp_path / "s" / TENSORS, tmp_path / "s" / "specialization.json"
    stored = bytearray(path.read_bytes())
    stored[-4] ^= 1  # the last bit of a gate's mantissa
    path.write_bytes(bytes(stored))
    with raises(CheckpointError, TENSORS, tmp_path / "s", code="damaged"):
        load_specialization(tmp_path / "s")
    fields = json.loads(readable.read_text())
    del fields["sha256"]
    readable.write_text(json.dumps(fields))
    load_specialization(tmp_path / "s")


@pytest.mark.parametrize("name", ["cloud", "edge", "pool", "prompt"])
def test_metadata_that_is_missing_is_named(tmp_path, name):
    save_specialization(synthetic(), tmp_path / "s")
    path = tmp_path / "s" / TENSORS
    with safetensors.safe_open(path, "numpy") as file:
        tensors, metadata = {x: file.get_tensor(x) for x in file.keys()}, file.metadata()  # noqa: SIM118
    path.write_bytes(safetensors.numpy.save(tensors, {k: v for k, v in metadata.items() if k != name}))
    with raises(CheckpointError, key(name)):
        load_specialization(tmp_path / "s")


@pytest.mark.parametrize("name", [TENSORS, "prompt.txt", "specialization.json"])
def test_an_oversized_file_is_refused_before_it_is_read(tmp_path, name):
    """Had the gates been read, their sum would be what is wrong: the file is all zeros."""
    save_specialization(synthetic(), tmp_path / "s")
    path = tmp_path / "s" / name
    if name == TENSORS:
        layers = LARGEST // 5 + 1
        header = {
            "index": {"dtype": "U8", "shape": [layers, 1], "data_offsets": [4 * layers, 5 * layers]},
            "weight": {"dtype": "F32", "shape": [layers, 1], "data_offsets": [0, 4 * layers]},
        }
        text = json.dumps(header).encode().ljust(512)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with path.open("r+b") as file:  # sparse: no data is written
            file.truncate(8 + len(text) + 5 * layers)
    else:
        with path.open("r+b") as file:
            file.truncate(LARGEST + 1)
    with raises(CheckpointError, f"{name}:size", path.stat().st_size):
        load_specialization(tmp_path / "s")


def test_gates_are_zero_where_no_expert_was_chosen():
    one = synthetic(layers=2, experts=4)
    gates_LE = one.gates(4).dense()
    assert (gates_LE.shape, gates_LE.dtype) == ((2, 4), np.float32)
    assert np.count_nonzero(gates_LE) == 4
    for layer in range(2):
        np.testing.assert_array_equal(gates_LE[layer, one.tensors["index"][layer]], one.tensors["weight"][layer])
    with raises(CheckpointError, key("index"), "1 experts"):
        one.gates(1)
    factors = dataclasses.replace(one, tensors={"up.a": np.ones((2, 3, 1), np.float32)})
    with raises(CheckpointError, key("index")):
        factors.gates(4)


def test_the_digest_is_that_of_the_prompts_bytes():
    assert synthetic(prompt="abc").digest == "ba7816bf8f01cfea"


@pytest.fixture
def special(made):
    """(specialization of a variant with other tensors, variables, settings)."""

    def get(name, change):
        settings, variables, generated = made(name)
        tensors = {**sparse_tensors(generated, settings)}
        change(tensors)
        fingerprints = {**FINGERPRINTS, "pool": pool_fingerprint(variables)}
        return Specialization(tensors, fingerprints, "x", None, VERSIONS), variables, settings

    return get


def rows_of(count):
    return lambda tensors: tensors.update({name: value[:count] for name, value in tensors.items()})


@pytest.mark.parametrize(
    ("name", "change", "field", "facts"),
    [
        ("shared", rows_of(2), "layers", (2, 3)),
        ("per_layer", rows_of(2), "layers", (2, 3)),
        ("direct", rows_of(2), "layers", (2, 3)),
        ("shared", lambda t: t.update(index=np.full_like(t["index"], 4)), key("index"), ("expert 4", "4 experts")),
        (
            "shared",
            lambda t: t.update(index=np.tile(np.arange(5, dtype=np.uint8), (3, 1)), weight=np.full((3, 5), 0.2)),
            key("index"),
            ("5 gates", "4 experts"),
        ),
        (
            "shared",
            lambda t: t.update(index=np.tile(np.arange(3, dtype=np.uint8), (3, 1)), weight=np.full((3, 3), 1 / 3)),
            key("index"),
            (3, 2),
        ),
        ("direct", lambda t: t.pop("up.a"), key("up.a"), (None, (16, 3))),
        ("direct", lambda t: t.update({"q.a": t["up.a"]}), key("q.a"), ((16, 3), None)),
        ("direct", lambda t: t.update({"down.b": t["down.b"][..., :9]}), key("down.b"), ((3, 9), (3, 16))),
    ],
)
def test_a_specialization_that_does_not_fit_the_generator_is_refused(special, name, change, field, facts):
    specialization, variables, settings = special(name, change)
    with raises(CheckpointError, field, *facts):
        adapter_of(specialization, variables, settings)


def test_factors_and_gates_are_not_taken_for_each_other(made):
    settings, variables, generated = made("direct")
    _, other, _ = made("shared")
    one = Specialization(sparse_tensors(generated, settings), {**FINGERPRINTS, "pool": "none"}, "x", None, VERSIONS)
    with raises(CheckpointError, key("pool")):
        adapter_of(one, other, SETTINGS)
    with raises(CheckpointError, key("pool")):
        adapter_of(synthetic(layers=3, experts=4), variables, settings)


def test_layers_that_the_generator_does_not_know_can_be_given(made):
    """With one meta token and one pool for all layers, its parameters fit any number of them."""
    settings, variables, generated = made("shared")
    shared = dataclasses.replace(settings, shared_meta_token=True)
    fingerprints = {**FINGERPRINTS, "pool": pool_fingerprint(variables)}
    tensors = {name: value[:2] for name, value in sparse_tensors(generated, settings).items()}
    one = Specialization(tensors, fingerprints, "x", None, VERSIONS)
    assert adapter_of(one, variables, shared, layers=2).gates.shape == (2, 1, 4)
    with raises(CheckpointError, "layers", 2, 3):
        adapter_of(one, variables, shared, layers=3)


def test_many_are_written_together_or_not_at_all(tmp_path):
    named = [(f"n{i}", synthetic(prompt=f"prompt {i}")) for i in range(3)]
    save_specializations(named, tmp_path / "all")
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["n0", "n1", "n2"]
    for name, one in named:
        assert load_specialization(tmp_path / "all" / name).prompt == one.prompt
    broken = [*named, ("n3", dataclasses.replace(named[0][1], versions={"jax": object()}))]
    with pytest.raises(TypeError):
        save_specializations(broken, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["all"]


def test_one_of_several_prompts_is_stored_as_if_it_were_alone():
    rng = np.random.default_rng(0)
    gates = keep_top_k(jnp.asarray(rng.dirichlet(np.ones(4), (3, 2)), np.float32), SETTINGS.top_k)
    factors = {"up": {"a": rng.random((2, 3, 5, 1), np.float32), "b": rng.random((2, 3, 1, 6), np.float32)}}
    alone = jax.tree.map(lambda x: x[:, 2:], factors)
    direct = dataclasses.replace(SETTINGS, generator="direct")
    for settings, together, single in (
        (SETTINGS, Generated(None, gates), Generated(None, jax.tree.map(lambda x: x[2:], gates))),
        (direct, Generated(PromptLoRA(factors, scale=1.0)), Generated(PromptLoRA(alone, scale=1.0))),
    ):
        found, expected = sparse_tensors(together, settings, 2), sparse_tensors(single, settings)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)
