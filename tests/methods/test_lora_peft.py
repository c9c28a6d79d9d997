"""Our LoRA says what peft's says with the same factors, beside the weights and merged into them."""

import warnings

import jax
import numpy as np
import pytest
from helpers import filled, logits, padded, token_rows

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import GeneratorConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import load_config, load_params
from lora_gen_jax.methods.lora import MultiTaskLoRA

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.float64
# Theirs is float32, whose sums are rounded by 2^-24 a term. The logits, of order 1, lie behind two layers of eight sums
# (the adapter's, too) of at most 48 products; a merged weight is one sum of three products, below 4, and an addition.
TOLERANCE, OF_A_WEIGHT = 2 * 8 * 48 * 2.0**-24, 4 * 4 * 2.0**-24
# α/r is neither 1 nor a power of two, so that a scale that is left out, or applied twice, shows.
SETTINGS = GeneratorConfig(rank=3, alpha=7.5, dropout=0.0, lora_sites=("q", "k", "v", "o", "gate", "up", "down"))
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPT_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# Grouped heads without biases, biases of q, k and v, and biases everywhere with other names and no gate.
MODELS = {"Llama": SIZES, "Qwen2": SIZES, "OPT": OPT_SIZES}
LLAMA_NAMES = {site: f"self_attn.{site}_proj" for site in "qkvo"} | {s: f"mlp.{s}_proj" for s in ("gate", "up", "down")}
OPT_NAMES = LLAMA_NAMES | {"o": "self_attn.out_proj", "up": "fc1", "down": "fc2"}
ROWS = token_rows([9, 6, 9], 61)


@pytest.fixture(scope="module", params=list(MODELS))
def case(request, tmp_path_factory):
    """(reference with peft's LoRA, decoder, params, our adapter, {site: module name in a layer})."""
    family = request.param
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**MODELS[family], attn_implementation="eager")
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in reference.parameters():
            weight.copy_(
                0.18 * torch.randn_like(weight) if weight.ndim == 2 else weight + 0.2 * torch.randn_like(weight)
            )
    directory = tmp_path_factory.mktemp(family)
    reference.save_pretrained(directory)
    decoder, params = Decoder(load_config(directory)), load_params(directory)
    module = MultiTaskLoRA(decoder.config, SETTINGS)
    factors = filled(jax.eval_shape(module.init, jax.random.key(0), None, None)["params"], 3)
    adapter = module.apply({"params": factors}, None, None).adapter
    names = OPT_NAMES if family == "OPT" else LLAMA_NAMES
    names = {site: name for site, name in names.items() if site in adapter.scanned}
    return with_peft(reference, adapter, names), decoder, params, adapter, names


def with_peft(reference, adapter, names):
    """The torch model with a LoRA of peft's that has the adapter's factors."""
    targets = [name.split(".")[-1] for name in names.values()]
    settings = peft.LoraConfig(r=SETTINGS.rank, lora_alpha=SETTINGS.alpha, lora_dropout=0.0, target_modules=targets)
    with warnings.catch_warnings():
        # peft asks transformers by a name that it is about to lose.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = peft.get_peft_model(reference, settings).eval()
    layers = layers_of(model.get_base_model())
    with torch.no_grad():
        for site, name in names.items():
            a, b = (np.asarray(adapter.scanned[site][part], np.float32) for part in "ab")
            for i, layer in enumerate(layers):
                linear = layer.get_submodule(name)
                # peft keeps a factor as torch keeps a weight: [outputs, inputs].
                linear.lora_A["default"].weight.copy_(torch.tensor(a[i].T))
                linear.lora_B["default"].weight.copy_(torch.tensor(b[i].T))
    return model


def layers_of(model):
    return model.model.decoder.layers if model.config.model_type == "opt" else model.model.layers


def reference_logits(model, tokens, positions):
    inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(positions >= 0).long()}
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def test_beside_the_weights_and_merged(case):
    """Both of ours against both of peft's; peft merges last, as that changes its model."""
    reference, decoder, params, adapter, names = case
    tokens, positions = padded(ROWS, 9)
    real, base = positions >= 0, np.asarray(logits(decoder, params, tokens, positions))
    beside, merged_params = logits(decoder, params, tokens, positions, adapter=adapter), merge(params, adapter)
    merged = logits(decoder, merged_params, tokens, positions)
    for theirs in (reference_logits(reference, tokens, positions), None):
        if theirs is None:
            reference = reference.merge_and_unload()
            theirs = reference_logits(reference, tokens, positions)
        for ours in (beside, merged):
            np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], atol=TOLERANCE, rtol=0)
    assert np.max(np.abs(np.asarray(beside) - base)[real]) > 0.5
    compare_weights(reference, merged_params, names)


def compare_weights(reference, merged_params, names):
    """Every linear layer's merged weight, and that biases stay."""
    groups = merged_params["layers"]
    for site, name in names.items():
        ours = groups["attention" if site in "qkvo" else "ffn"][site]
        for i, layer in enumerate(layers_of(reference)):
            linear = layer.get_submodule(name)
            np.testing.assert_allclose(
                ours["kernel"][i], linear.weight.detach().numpy().T, rtol=0, atol=OF_A_WEIGHT, err_msg=site
            )
            assert ("bias" in ours) == (linear.bias is not None)
            if linear.bias is not None:
                np.testing.assert_array_equal(ours["bias"][i], linear.bias.detach().numpy())


def test_every_site_of_the_model_is_compared(case):
    _, decoder, params, adapter, names = case
    linear = {*params["layers"]["attention"], *params["layers"]["ffn"]}
    assert set(adapter.scanned) == set(names) == linear
    assert len(linear) == (6 if decoder.config.family == "opt" else 7)
