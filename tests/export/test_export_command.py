"""The command: the shipped pair in every format, shards, the base model, and what is refused or interrupted."""

import dataclasses
import json
import shutil
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import CLOUD, EDGE, exact_logits, raises, random_params

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.adapters.specialization import Specialization, save_specialization
from lora_gen_jax.adapters.specialization_fit import adapter_of, pool_fingerprint
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import load_config, load_hf_config, load_params, load_tokenizer, resolve, save
from lora_gen_jax.errors import CheckpointError, ConfigError, ModelError, OutputError
from lora_gen_jax.export.command import Export, export_command
from lora_gen_jax.export.factors import lora_factors
from lora_gen_jax.training.checkpoint import load_checkpoint
from lora_gen_jax.training.portable import SHIPPED

FORMATS: list[Any] = ["peft", "merged", "gguf"]


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    """(directory, specialization, shipped generator): gates over the shipped pool."""
    loaded = load_checkpoint(SHIPPED["quickstart"])
    settings, layers = loaded.config.generator, load_config("pocket-edge").num_layers
    rng = np.random.default_rng(5)
    experts = [rng.permutation(settings.num_experts)[: settings.top_k] for _ in range(layers)]
    weight = np.full((layers, settings.top_k), 1 / settings.top_k, np.float32)
    tensors = {"index": np.stack(experts).astype(np.uint8), "weight": weight}
    prints = loaded.fingerprints | {"pool": pool_fingerprint(loaded.variables)}
    special = Specialization(tensors, prints, "Say it.", None, {"jax": jax.__version__})
    directory = tmp_path_factory.mktemp("pocket") / "special"
    save_specialization(special, directory)
    return directory, special, loaded


@pytest.fixture(scope="module")
def answered(pocket):
    """(ids [1, T], logits [T, V] in float64, how far float32's may be off), of the shipped edge model when merged."""
    _, special, loaded = pocket
    config = load_config("pocket-edge")
    params = merge(load_params("pocket-edge"), adapter_of(special, loaded.variables, loaded.config.generator))
    ids = np.array([load_tokenizer("pocket-edge")('cow: "moo"\n\nowl:')["input_ids"]], np.int32)
    exact, rounding = exact_logits(Decoder(config), params, ids)
    return ids, exact[0], rounding


def torch_logits(model, ids):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(ids, dtype=torch.long)).logits[0].numpy()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_shipped_pair_is_exported_without_a_checkpoint_in_every_format(pocket, answered, tmp_path, capsys):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids, wanted, rounding = answered
    for form in FORMATS:
        export_command(Export(form, tmp_path / form, pocket[0]))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / form) for form in FORMATS]
    assert all(path.stat().st_mode & 0o044 for path in tmp_path.rglob("*"))
    assert "PEFT adapter of rank" in lines[0]
    assert "MB; load it with" in lines[1]
    assert str(tmp_path / "gguf" / "adapter.gguf") in lines[2]
    # transformers does not know the shipped model's name: the card says how to get the model.
    assert "export --base --edge pocket-edge --format merged" in (tmp_path / "peft" / "README.md").read_text()

    export_command(Export("merged", tmp_path / "base", edge="pocket-edge", base=True))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert np.abs(torch_logits(base, ids) - wanted).max() > 0.1
    peft = PeftModel.from_pretrained(base, str(tmp_path / "peft")).merge_and_unload()
    np.testing.assert_allclose(torch_logits(peft, ids), wanted, rtol=0, atol=rounding)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(torch_logits(merged, ids), wanted, rtol=0, atol=rounding)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")('cow: "moo"\n\nowl:')["input_ids"] == ids[0].tolist()

    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "gguf" / "adapter.gguf").tensors}
    name = "model.layers.2.mlp.down_proj.weight"
    before = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "base").named_parameters())[name].detach().numpy()
    weight = dict(peft.named_parameters())[name].detach().numpy()
    b, a = (found[f"blk.2.ffn_down.weight.lora_{x}"] for x in "ba")
    # Each of the two sums is rounded, too.
    assert np.all(np.abs(before + b @ a - weight) <= summed(b, a) + 2 * 2.0**-24 * (np.abs(weight) + summed(b, a)))


def summed(a, b):
    """What two float32 programs for a·b may differ by: bounds for each of its columns.

    A term is rounded when it is made, by up to two scales, and in each of the sums that it is in. An entry of a may be
    a mean of experts', so that its rounding is of the size of the largest.
    """
    return 2 * (a.shape[-1] + 3) * 2.0**-24 * np.abs(a).max() * np.abs(b).sum(axis=-2, keepdims=True)


@pytest.mark.parametrize("variant", ["shared", "per_layer", "factors", "gumbel", "direct"])
def test_factors_multiply_to_what_the_adapter_adds(case, variant):
    one = case("llama", variant)
    # Merged into weights of zero, an adapter leaves its ΔW.
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), load_params(one.edge))
    merged = merge(nothing, adapter_of(one.specialization, one.variables, one.settings))["layers"]["ffn"]
    for site, pair in lora_factors(one.specialization, one.variables, one.settings).items():
        wanted = np.asarray(merged[site]["kernel"])
        assert np.all(np.abs(pair["a"] @ pair["b"] - wanted) <= summed(pair["a"], pair["b"]))
        assert np.all(np.abs(wanted).max(axis=(1, 2)) > 0.01)


def test_an_expert_whose_gate_is_zero_adds_nothing(case):
    one = case("llama")
    tensors = {**one.specialization.tensors, "weight": np.tile(np.array([1.0, 0.0], np.float32), (3, 1))}
    single = lora_factors(dataclasses.replace(one.specialization, tensors=tensors), one.variables, one.settings)
    scale = one.settings.alpha / one.settings.rank
    pool = one.variables["params"]["pool"]
    for layer, (expert, _) in enumerate(one.specialization.tensors["index"]):
        wanted = scale * np.asarray(pool["up_a"][expert]) @ np.asarray(pool["up_b"][expert])
        a, b = (single["up"][x][layer] for x in "ab")
        assert np.all(np.abs(a @ b - wanted) <= summed(a, b))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_shards_hold_every_tensor_once_and_load_again(case, tmp_path, family):
    one = case(family)
    export_command(Export("merged", tmp_path / "whole", one.directory, one.checkpoint))
    export_command(Export("merged", tmp_path / "parts", one.directory, one.checkpoint, max_shard_size_gb=20e-6))
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert sorted(set(index["weight_map"].values())) == files
    whole, parts = load_params(tmp_path / "whole"), load_params(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    # The embedding of 96 rows of 32 numbers is 12 KB: nothing but a single tensor may pass 20 KB, headers aside.
    assert all((tmp_path / "parts" / name).stat().st_size < 24e3 for name in files)
    merged = merge(load_params(one.edge), adapter_of(one.specialization, one.variables, one.settings))
    jax.tree.map(np.testing.assert_array_equal, whole, merged)


def test_the_base_model_is_written_as_it_is_with_its_tokenizer(case, tmp_path):
    one = case("llama_biased")
    export_command(Export("merged", tmp_path / "out", edge=str(one.edge), base=True))
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "out"), load_params(one.edge))
    assert load_config(tmp_path / "out") == one.config
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (one.edge / name).read_bytes()
    config = load_hf_config(tmp_path / "out")
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_stop_tokens_settings_of_generation_and_the_chat_template_are_those_of_the_original(case, tmp_path):
    from transformers import AutoTokenizer

    edge = shutil.copytree(case("llama_biased").edge, tmp_path / "edge")
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (edge / "chat_template.jinja").write_text(template)
    (edge / "generation_config.json").write_text('{"eos_token_id": [9, 5], "temperature": 0.5, "do_sample": true}')
    export_command(Export("merged", tmp_path / "out", edge=str(edge), base=True))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    # 2 is the tokenizer's own end token </s>, 1 its <s>.
    assert (written["eos_token_id"], written["bos_token_id"]) == ([2, 5, 9], 1)
    assert (written["temperature"], written["do_sample"]) == (0.5, True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template

    (edge / "generation_config.json").unlink()
    export_command(Export("merged", tmp_path / "plain", edge=str(edge), base=True))
    assert json.loads((tmp_path / "plain" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_half_precision_rounds_the_merged_weights_once(case, tmp_path):
    one = case("llama_biased")
    export_command(Export("merged", tmp_path / "out", one.directory, one.checkpoint, dtype="bfloat16"))
    merged = merge(load_params(one.edge), adapter_of(one.specialization, one.variables, one.settings))
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), merged)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "out"), rounded)
    assert load_hf_config(tmp_path / "out")["dtype"] == "bfloat16"


def test_numbers_beyond_half_precision_are_refused():
    with raises(ConfigError, "dtype", "layer.weight", "7e+04", "bfloat16"):
        save.cast(np.array([7e4], np.float32), np.float16, "layer.weight")
    np.testing.assert_array_equal(save.cast(np.array([6e4], np.float32), np.float16, "x"), np.array([6e4], np.float16))


@pytest.mark.parametrize("form", FORMATS)
def test_a_directory_that_holds_something_is_left_as_it_is(case, tmp_path, form):
    (tmp_path / "mine.txt").write_text("mine")
    with raises(OutputError, "--out", tmp_path, code="exists"):
        export_command(Export(form, tmp_path, case("llama").directory))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ("peft", "lora_gen_jax.decoder.pretrained.save.save_file"),
        ("merged", "lora_gen_jax.decoder.pretrained.save.save_file"),
        ("gguf", "lora_gen_jax.export.gguf.gguf.GGUFWriter.write_tensors_to_file"),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(case, tmp_path, monkeypatch, form, place, error):
    one = case("llama")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(place, fails)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export_command(Export(form, tmp_path / "out", one.directory, one.checkpoint))
    assert list(tmp_path.iterdir()) == []


def test_flags_that_do_not_fit_together_are_named(case, tmp_path):
    one, out = case("llama"), tmp_path / "out"
    with raises(ConfigError, "--format", "--base", "peft"):
        export_command(Export("peft", out, one.directory, base=True))
    for flags in (Export("peft", out), Export("merged", out, base=True), Export("merged", out, edge="pocket-edge")):
        with raises(ConfigError, "--specialization", code="missing"):
            export_command(flags)
    with raises(ConfigError, "--max-shard-size-gb", 0, code="range"):
        export_command(Export("merged", out, one.directory, max_shard_size_gb=0))
    with raises(ModelError, "model", "'nowhere'"):
        export_command(Export("merged", out, edge="nowhere", base=True))
    assert not out.exists()


@pytest.mark.parametrize("form", FORMATS)
def test_another_edge_model_is_refused(case, tmp_path, form):
    one = case("llama")
    with raises(CheckpointError, "--edge", one.directory):
        export_command(Export(form, tmp_path / "out", one.directory, one.checkpoint, str(case("llama_biased").edge)))
    assert not (tmp_path / "out").exists()


def test_a_model_is_saved_from_numpy_as_well(tmp_path):
    hf = {
        "model_type": "llama",
        "vocab_size": CLOUD.vocab_size,
        "hidden_size": EDGE.width,
        "intermediate_size": EDGE.ffn_width,
        "num_hidden_layers": EDGE.num_layers,
        "num_attention_heads": EDGE.num_heads,
        "num_key_value_heads": EDGE.num_kv_heads,
        "head_dim": EDGE.head_dim,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    params = jax.tree.map(np.asarray, random_params(EDGE))
    tokenizer = load_tokenizer("pocket-edge")
    save.save_pretrained(tmp_path, hf, params, tokenizer, np.float32)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path), params)
    assert "torch_dtype" not in load_hf_config(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.network
def test_an_adapter_of_a_gguf_edge_model_fits_the_tensors_of_its_file(tmp_path):
    """The real SmolLM2-135M: names and shapes are those that llama.cpp looks for in the base model."""
    try:
        found = resolve("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    if found.kind != "gguf":
        pytest.skip("the model is here as a Hugging Face directory")
    from lora_gen_jax.export.factors import ExportedAdapter
    from lora_gen_jax.export.gguf import write_gguf

    config, rng = load_config(found), np.random.default_rng(0)
    factors = {}
    for site in config.ffn_sites:
        inputs, outputs = config.site_shape(site)
        a = rng.standard_normal((config.num_layers, inputs, 4)).astype(np.float32)
        factors[site] = {"a": a, "b": rng.standard_normal((config.num_layers, 4, outputs)).astype(np.float32)}
    write_gguf(ExportedAdapter("smollm2-135m", config, factors, {}), tmp_path, "float32")
    base = {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(found.model).tensors}
    adapter = {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    ffn = [name for name in base if ".ffn_" in name and "norm" not in name]
    assert len(adapter) == 2 * len(ffn) == 6 * config.num_layers
    for name in ffn:  # ggml counts axes from the innermost
        inputs, outputs = base[name]
        assert (adapter[f"{name}.lora_a"], adapter[f"{name}.lora_b"]) == ([inputs, 4], [4, outputs])
