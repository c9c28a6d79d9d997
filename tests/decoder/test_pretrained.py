"""Hugging Face directories: every family saved by transformers, loaded exactly; errors name the file and the remedy."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import raises
from hf_families import FAMILIES, SIZES, build
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_gen_jax.decoder import pretrained
from lora_gen_jax.decoder.pretrained.assembly import assemble
from lora_gen_jax.decoder.pretrained.hf import HFCheckpoint
from lora_gen_jax.errors import ModelError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves each family once: (directory, state dict as NumPy)."""
    done = {}

    def save(family):
        if family not in done:
            model = build(family)
            directory = tmp_path_factory.mktemp(family)
            model.save_pretrained(directory)
            done[family] = directory, {name: value.numpy() for name, value in model.state_dict().items()}
        return done[family]

    return save


@pytest.fixture
def llama(saved, tmp_path):
    """A copy of the Llama directory that a test may damage."""
    return Path(shutil.copytree(saved("llama")[0], tmp_path / "llama"))


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def expected(family, state):
    """The tree, written out by hand from the names in transformers' modules."""
    opt = family == "opt"
    base = "model.decoder." if opt else "model."
    layers = range(SIZES["num_hidden_layers"])

    def stack(name, transpose=False):
        values = [state[f"{base}layers.{i}.{name}"] for i in layers]
        return np.stack([value.T if transpose else value for value in values])

    def norm(name):
        found = {"scale": stack(f"{name}.weight")}
        return found | {"bias": stack(f"{name}.bias")} if opt else found

    def linear(name):
        found = {"kernel": stack(f"{name}.weight", transpose=True)}
        return found | {"bias": stack(f"{name}.bias")} if f"{base}layers.0.{name}.bias" in state else found

    out = "out_proj" if opt else "o_proj"
    tree = {
        "embed": {"embedding": state[f"{base}embed_tokens.weight"]},
        "layers": {
            "attention_norm": norm("self_attn_layer_norm" if opt else "input_layernorm"),
            "attention": {s: linear(f"self_attn.{out if s == 'o' else s + '_proj'}") for s in "qkvo"},
        },
    }
    if opt:
        tree["positions"] = {"embedding": state[f"{base}embed_positions.weight"]}
        tree["layers"] |= {"ffn_norm": norm("final_layer_norm"), "ffn": {"up": linear("fc1"), "down": linear("fc2")}}
        last = f"{base}final_layer_norm"
        return tree | {"final_norm": {"scale": state[f"{last}.weight"], "bias": state[f"{last}.bias"]}}
    tree["layers"]["ffn"] = {s: linear(f"mlp.{s}_proj") for s in ("gate", "up", "down")}
    tree["final_norm"] = {"scale": state["model.norm.weight"]}
    if family == "gemma2":
        tree["layers"]["post_attention_norm"] = norm("post_attention_layernorm")
        tree["layers"]["ffn_norm"] = norm("pre_feedforward_layernorm")
        tree["layers"]["post_ffn_norm"] = norm("post_feedforward_layernorm")
    else:
        tree["layers"]["ffn_norm"] = norm("post_attention_layernorm")
    if family in ("llama", "qwen2"):
        tree["unembed"] = {"kernel": state["lm_head.weight"].T}
    return tree


def assert_same(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), actual, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_is_where_it_belongs(saved, family):
    directory, state = saved(family)
    params = pretrained.load_params(str(directory))
    assert_same(params, expected(family, state))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_describes_the_tree(saved, family):
    directory, _ = saved(family)
    config = pretrained.load_config(directory)
    params = pretrained.load_params(directory, config)
    table = list(pretrained.leaves(config))
    assert len(table) == len(jax.tree.leaves(params))
    for leaf in table:
        node = params
        for key in leaf.path:
            node = node[key]
        assert node.shape == leaf.full_shape(config.num_layers)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_shards_give_the_same_tree(saved, tmp_path, family):
    _, state = saved(family)
    build(family).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(pretrained.load_params(tmp_path), expected(family, state))
    assert pretrained.fingerprint(tmp_path) == pretrained.fingerprint(saved(family)[0])


@pytest.mark.parametrize("family", ["llama_biased", "gemma2", "opt"])
def test_a_base_model_without_prefix(saved, tmp_path, family):
    build(family).model.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in HFCheckpoint(tmp_path)._shard_of)
    assert_same(pretrained.load_params(tmp_path), expected(family, saved(family)[1]))


def test_bfloat16_on_disk_and_in_memory(saved, tmp_path):
    _, state = saved("llama")
    wanted = expected("llama", state)
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted)
    in_bf16 = pretrained.load_params(tmp_path, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(in_bf16))
    assert_same(in_bf16, rounded)
    assert_same(pretrained.load_params(tmp_path), jax.tree.map(lambda x: x.astype(np.float32), rounded))
    assert_same(pretrained.load_params(saved("llama")[0], dtype=jnp.bfloat16), rounded)


class Recorder(HFCheckpoint):
    """Counts the elements read."""

    elements = 0

    def read(self, name, index):
        values = super().read(name, index)
        self.elements += values.size
        return values


def test_shardings_place_leaves_and_read_every_element_once(saved):
    directory, state = saved("qwen2")
    config = pretrained.load_config(directory)
    devices = len(jax.devices())
    count = max(n for n in (1, 2, 4, 8) if n <= devices)
    mesh = jax.make_mesh((count,), ("model",), devices=jax.devices()[:count], axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec(None, None, "model"))
    tree = jax.tree.map(lambda _: None, expected("qwen2", state))
    tree["layers"]["ffn"] = {site: {"kernel": split} for site in ("gate", "up", "down")}
    checkpoint = Recorder(directory)
    params = assemble(config, checkpoint, np.float32, tree)
    assert_same(params, expected("qwen2", state))
    assert params["layers"]["ffn"]["up"]["kernel"].sharding.is_equivalent_to(split, 3)
    assert checkpoint.elements == sum(leaf.size for leaf in jax.tree.leaves(params))

    everywhere = NamedSharding(mesh, PartitionSpec())
    params = pretrained.load_params(directory, config, shardings=everywhere)
    assert all(leaf.sharding.is_equivalent_to(everywhere, leaf.ndim) for leaf in jax.tree.leaves(params))
    with raises(ModelError, "shardings", "embed/embedding"):
        pretrained.load_params(directory, config, shardings={"layers": None})


def test_reads_are_small(saved, monkeypatch):
    directory, state = saved("llama")
    monkeypatch.setattr("lora_gen_jax.decoder.pretrained.assembly._BLOCK_ELEMENTS", 100)
    largest = 0
    read = HFCheckpoint.read

    def watched(self, name, index):
        nonlocal largest
        values = read(self, name, index)
        largest = max(largest, values.size)
        return values

    monkeypatch.setattr(HFCheckpoint, "read", watched)
    assert_same(pretrained.load_params(directory), expected("llama", state))
    assert largest <= 100


def test_fingerprint_knows_content_and_not_the_loading(saved, tmp_path):
    prints = {family: pretrained.fingerprint(saved(family)[0]) for family in FAMILIES}
    assert len(set(prints.values())) == len(FAMILIES)
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in prints.values())

    model = build("llama")
    model.save_pretrained(tmp_path / "copy")
    assert pretrained.fingerprint(tmp_path / "copy") == prints["llama"]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1e-6
    model.save_pretrained(tmp_path / "tuned")
    assert pretrained.fingerprint(tmp_path / "tuned") != prints["llama"]
    edit_config(tmp_path / "copy", rms_norm_eps=3e-6)
    assert pretrained.fingerprint(tmp_path / "copy") != prints["llama"]


def test_fingerprint_samples_large_tensors(tmp_path):
    from lora_gen_jax.decoder.pretrained.content_hash import _windows

    assert _windows(100, 64) == [(0, 100)]
    windows = _windows(100_000, 1024)
    assert len(windows) == 8
    assert (windows[0], windows[-1]) == ((0, 64), (99_936, 100_000))
    assert _windows(3, 1 << 20) == [(0, 3)]


def fails(directory, field, *facts):
    with raises(ModelError, field, *facts):
        pretrained.load_params(directory)


def test_missing_config(llama):
    (llama / "config.json").unlink()
    fails(llama, "config.json", llama / "config.json", "save_pretrained")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_config_that_is_no_json_object(llama, text):
    (llama / "config.json").write_text(text)
    fails(llama, "config.json", llama / "config.json")


def test_unknown_family(llama):
    edit_config(llama, model_type="mamba")
    fails(llama, "config.json:model_type", "'mamba'", "llama, qwen2")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 0), ("vocab_size", "96"), ("intermediate_size", 48.0), ("num_key_value_heads", 3)],
)
def test_sizes_that_no_model_has(llama, field, value):
    edit_config(llama, **{field: value})
    fails(llama, f"config.json:{field}", field, repr(value))


def test_heads_that_do_not_divide_the_width(llama):
    edit_config(llama, hidden_size=33, head_dim=None)
    fails(llama, "config.json:hidden_size", 33, "num_attention_heads", "head_dim")


def test_no_weights(llama):
    (llama / "model.safetensors").unlink()
    fails(llama, "model.safetensors", "model.safetensors.index.json")
    (llama / "pytorch_model.bin").touch()
    fails(llama, "model.safetensors", "PyTorch", "save_pretrained")


def test_missing_shard(tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    fails(tmp_path, shard.name, "model.safetensors.index.json")


@pytest.mark.parametrize("keep", [0, 7, 500, -10])
def test_truncated_weights(llama, keep):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    fails(llama, "model.safetensors", path)


def test_missing_tensor_and_wrong_shape(llama):
    edit_config(llama, num_hidden_layers=4)
    fails(llama, "model.layers.3.input_layernorm.weight")
    edit_config(llama, num_hidden_layers=2)
    fails(llama, "config.json:num_hidden_layers", 2, "model.layers.2.input_layernorm.weight")
    edit_config(llama, num_hidden_layers=3, intermediate_size=64)
    fails(llama, "model.layers.0.mlp.gate_proj.weight", "(48, 32)", "(64, 32)")


def test_untied_model_without_unembedding(saved, tmp_path):
    directory = Path(shutil.copytree(saved("llama_biased")[0], tmp_path / "tied"))
    edit_config(directory, tie_word_embeddings=False)
    fails(directory, "lm_head.weight", "tie_word_embeddings")


def test_quantized_checkpoint(llama):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, llama / "model.safetensors")
    fails(llama, name, "I8", "F32")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 2**32 - 1),
        ("hidden_size", 10**40),
        ("hidden_size", None),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", None),
        ("rope_parameters", [1]),
        ("rope_scaling", "x"),
        ("hidden_act", ["silu"]),
        ("model_type", ["llama"]),
    ],
)
def test_a_field_of_another_type_or_beyond_any_model_is_named(llama, field, value):
    edit_config(llama, **{field: value})
    with raises(ModelError, f"config.json:{field}"):
        pretrained.load_config(llama)


def test_more_layers_than_the_file_holds_are_noticed_at_the_last_one(llama):
    edit_config(llama, num_hidden_layers=9_999)
    with raises(ModelError, "model.layers.9998.input_layernorm.weight"):
        pretrained.load_params(llama)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', "[]"])
def test_a_config_that_is_no_object_within_bounds_is_named(llama, text):
    (llama / "config.json").write_text(text)
    with raises(ModelError, "config.json", llama / "config.json"):
        pretrained.load_config(llama)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(llama, value):
    from safetensors.numpy import load_file, save_file

    tensors, name = load_file(llama / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = value
    save_file(tensors, llama / "model.safetensors")
    with raises(ModelError, name, llama, code="not finite"):
        pretrained.load_params(llama)
