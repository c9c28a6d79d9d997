"""Every format and family: other programs' models with what was exported answer as ours with the adapter merged."""

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from helpers import logits, refused

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.adapters.specialization_fit import adapter_of
from lora_gen_jax.cli import guarded
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import load_params
from lora_gen_jax.export.command import Export, export_command

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FAMILIES = ["llama", "llama_biased", "qwen2", "gemma", "gemma2", "opt"]
CASES = [(family, "shared") for family in FAMILIES]
CASES += [("llama", variant) for variant in ("per_layer", "factors", "gumbel", "direct")]
GGUF_SITES = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
# Of peft 0.21 with transformers 5.23.
PEFT_NOTICE = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TOKENS = np.random.default_rng(3).integers(2, 60, (2, 12)).astype(np.int32)


def export(case, out: Path, form: Any, **flags) -> Path:
    export_command(Export(form, out, case.directory, case.checkpoint, **flags))
    return out


params_of = functools.cache(load_params)


@functools.cache
def ours(case) -> np.ndarray:
    """Logits [2, 12, V] of our decoder in float64, merged by our own `merge`."""
    adapter = adapter_of(case.specialization, case.variables, case.settings)
    params = merge(params_of(case.edge), adapter)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return np.asarray(logits(Decoder(case.config), params, TOKENS))


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@functools.cache
def base(directory: Path) -> np.ndarray:
    return theirs(load(directory))


def assert_specialized(case, model):
    wanted = ours(case)
    # What is compared differs from the base model, so that an export of nothing would be noticed.
    assert np.abs(wanted - base(case.edge)).max() > 0.05
    # Theirs is float32: three layers of eight sums of at most 48 products, each rounded by 2^-24 of logits of order 1.
    np.testing.assert_allclose(theirs(model), wanted, rtol=0, atol=3 * 8 * 48 * 2.0**-24)


@PEFT_NOTICE
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_peft_answers_as_ours_beside_the_weights_and_merged(case, tmp_path, family, variant):
    one = case(family, variant)
    export(one, tmp_path / "out", "peft")
    model = peft.PeftModel.from_pretrained(load(one.edge), str(tmp_path / "out"))
    assert_specialized(one, model)
    assert_specialized(one, model.merge_and_unload())


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_transformers_answers_as_ours_with_the_merged_model(case, tmp_path, family, variant):
    one = case(family, variant)
    export(one, tmp_path / "out", "merged")
    assert_specialized(one, load(tmp_path / "out"))


@pytest.mark.parametrize(("family", "variant"), [pair for pair in CASES if pair[0] != "opt"])
def test_the_gguf_adapter_holds_the_same_change_of_the_weights(case, tmp_path, family, variant):
    one = case(family, variant)
    export(one, tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    model = load(one.edge)
    weights = dict(model.named_parameters())
    for name in [name for name in tensors if name.endswith(".lora_a")]:
        _, block, site, _, _ = name.split(".")
        a, b = tensors[name], tensors[name[:-1] + "b"]
        scale = fields["adapter.lora.alpha"] / a.shape[0]  # as llama.cpp scales
        with torch.no_grad():
            weights[f"model.layers.{block}.{GGUF_SITES[site]}.weight"] += torch.tensor(scale * b @ a)
    assert len(tensors) == 2 * 3 * one.config.num_layers
    assert_specialized(one, model)
    assert fields["general.architecture"] == family.removesuffix("_biased")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert one.specialization.fingerprints["pool"] in fields["general.description"]


def test_the_rank_is_that_of_all_active_experts(case, tmp_path):
    # R = 3, K = 2, E = 4 of the tests' settings.
    for variant, rank in {"shared": 6, "per_layer": 6, "factors": 3, "gumbel": 12, "direct": 3}.items():
        out = export(case("llama", variant), tmp_path / variant, "peft")
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, rank)
        assert config["target_modules"] == ["gate_proj", "up_proj", "down_proj"]


def test_an_adapter_of_opt_names_its_own_layers_and_says_what_it_is_of(case, tmp_path):
    one = case("opt")
    out = export(one, tmp_path / "out", "peft")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["fc1", "fc2"]
    assert config["base_model_name_or_path"] == str(one.edge)
    card = (out / "README.md").read_text()
    for value in one.specialization.fingerprints.values():
        assert value in card
    assert "jax 1.2.3" in card
    assert one.specialization.prompt not in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_nearest_of_every_number(case, tmp_path, dtype):
    from lora_gen_jax.export.factors import lora_factors

    one = case("llama")
    a = lora_factors(one.specialization, one.variables, one.settings)["up"]["a"][1].T
    nearest = torch.tensor(a.copy()).to(getattr(torch, dtype))
    export(one, tmp_path / "peft", "peft", dtype=dtype)
    stored = peft.utils.load_peft_weights(str(tmp_path / "peft"), device="cpu")
    assert torch.equal(stored["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"], nearest)
    export(one, tmp_path / "gguf", "gguf", dtype=dtype)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "gguf" / "adapter.gguf").tensors}
    tensor = found["blk.1.ffn_up.weight.lora_a"]
    np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), nearest.float().numpy())


def test_a_family_that_llama_cpp_lacks_is_refused_before_anything_is_written(case, tmp_path, capsys):
    refused(
        capsys, lambda _: guarded(lambda: export(case("opt"), tmp_path / "out", "gguf")), [], "opt", "--format peft"
    )
    assert list(tmp_path.iterdir()) == []
