"""The families of decoders that can be read, by the `model_type` of their ``config.json``.

To add one, write its `Family`, in a file of its own, and its line in `FAMILIES`.
"""

from collections.abc import Callable
from typing import Any

from lora_gen_jax.decoder.family import HF, LLAMA_NAMES, Family, Fields, activation, rotary, windowed_layers
from lora_gen_jax.errors import ModelError


def _qwen2(hf: HF) -> Fields:
    fields = rotary(hf) | {"qkv_bias": True, "out_bias": False}
    if hf.get("use_sliding_window"):
        windowed = windowed_layers(hf, lambda i: i >= hf.get("max_window_layers", 28))
        fields |= {"sliding_window": hf["sliding_window"], "windowed_layers": windowed}
    return fields


def _gemma(hf: HF) -> Fields:
    name = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu"
    # The first Gemma configs say "gelu" and mean the tanh approximation, which transformers applies as well.
    named = hf | {"hidden_activation": "gelu_pytorch_tanh" if name == "gelu" else name}
    fields = rotary(named, _GEMMA_HEAD_DIM) | {"tied_embeddings": hf.get("tie_word_embeddings", True)}
    return fields | {"norm_offset": 1.0, "embedding_scale": fields["width"] ** 0.5}


def _gemma2(hf: HF) -> Fields:
    return _gemma(hf) | {
        "post_norms": True,
        "attention_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": hf.get("attn_logit_softcapping", 50.0),
        "logit_softcap": hf.get("final_logit_softcapping", 30.0),
        "sliding_window": hf.get("sliding_window", 4096),
        "windowed_layers": windowed_layers(hf, lambda i: i % 2 == 0),
    }


def _gemma2_gguf(get: Callable[..., Any], config: HF) -> HF:
    return {
        "attn_logit_softcapping": get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": get("final_logit_softcapping", 30.0),
        "sliding_window": get("attention.sliding_window", 4096),
        # Not in the metadata. As llama.cpp does: the head size, but the width per head in the 27B (46 layers).
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if config["num_hidden_layers"] == 46
        else config["head_dim"],
    }


def _opt(hf: HF) -> Fields:
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    if not hf.get("do_layer_norm_before", True) or (hf.get("word_embed_proj_dim") or width) != width:
        raise ModelError(
            "OPT with post-norm layers or projected embeddings (350m) is not supported",
            field="config.json:do_layer_norm_before",
            remedy="use another size",
        )
    if hf.get("_remove_final_layer_norm"):
        raise ModelError(
            "OPT without a final layer norm (_remove_final_layer_norm) is not supported",
            field="config.json:_remove_final_layer_norm",
        )
    if not hf.get("layer_norm_elementwise_affine", True):
        raise ModelError(
            "OPT without layer norm parameters (layer_norm_elementwise_affine false) is not supported",
            field="config.json:layer_norm_elementwise_affine",
        )
    bias = hf.get("enable_bias", True)
    return {
        "vocab_size": hf["vocab_size"],
        "num_layers": hf["num_hidden_layers"],
        "width": width,
        "ffn_width": hf["ffn_dim"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "max_positions": hf.get("max_position_embeddings", 2048),
        "norm": "layer",
        "activation": activation(hf.get("activation_function") or "relu"),
        "gated_ffn": False,
        "qkv_bias": bias,
        "out_bias": bias,
        "ffn_bias": bias,
        "rope_theta": None,
        "learned_position_offset": 2,
        "attention_scale": (width // heads) ** -0.5,
        "tied_embeddings": hf.get("tie_word_embeddings", True),
    }


_GEMMA_HEAD_DIM = 256
_GEMMA2_NAMES = {
    **LLAMA_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
}
_OPT_NAMES = {
    "base": "model.decoder.",
    "attention_norm": "self_attn_layer_norm",
    "ffn_norm": "final_layer_norm",
    "final_norm": "final_layer_norm",
    "o": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}
_GEMMA = {"head_dim": _GEMMA_HEAD_DIM, "gguf": True, "gguf_norm_offset": 1.0}
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", rotary, gguf=True, gguf_permuted=True),
        Family("qwen2", "Qwen2ForCausalLM", _qwen2, gguf=True),
        Family("gemma", "GemmaForCausalLM", _gemma, **_GEMMA),
        Family("gemma2", "Gemma2ForCausalLM", _gemma2, _GEMMA2_NAMES, gguf_fields=_gemma2_gguf, **_GEMMA),
        Family("opt", "OPTForCausalLM", _opt, _OPT_NAMES),
    )
}
