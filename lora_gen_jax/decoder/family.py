"""One family of decoders: what its ``config.json`` means, and what its tensors are called.

In: the dictionary of a Hugging Face ``config.json``. Out: fields of a `DecoderConfig`, all that the `Decoder` knows.
Fields of a config.json that the decoder cannot follow must raise ModelError: a model that is silently computed wrongly
is worse than none.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from lora_gen_jax.errors import ModelError
from lora_gen_jax.untrusted import check_fields, shown

HF = dict[str, Any]
Fields = dict[str, Any]
LARGEST_SIZE = 2**31
POSITIVE = Annotated[float, 1e-30, 1e30]
_ROPE = {
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), POSITIVE),
    "original_max_position_embeddings": Annotated[int, 1, LARGEST_SIZE],
}
FILE = "config.json"
LLAMA_NAMES = {
    "base": "model.",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "final_norm": "norm",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: in config.json, and `general.architecture` of GGUF files.
        architecture: the class of transformers.
        fields: from a config.json to fields of a `DecoderConfig`, all but its family. It may raise KeyError.
        names: of the parts of a model in a checkpoint; q, k and v are self_attn.?_proj.
        head_dim: of a config.json that says none; None where the width is divided by the heads.
        gguf: whether llama.cpp's files of it can be read.
        gguf_norm_offset: that llama.cpp has added to its norms.
        gguf_permuted: whether llama.cpp has permuted its q and k, for halves of a head that are interleaved.
        gguf_fields: from a GGUF file's `get` and what config.json would hold to what it holds beside that.
    """

    model_type: str
    architecture: str
    fields: Callable[[HF], Fields]
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_NAMES)
    head_dim: int | None = None
    gguf: bool = False
    gguf_norm_offset: float = 0.0
    gguf_permuted: bool = False
    gguf_fields: Callable[[Callable[..., Any], HF], HF] = lambda get, config: {}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent stretching of rotary wavelengths (`rope_type: llama3`)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int


def rotary(hf: HF, head_dim: int | None = None) -> Fields:
    """What the families with rotated heads and gated FFNs have in common: Llama, as its config.json says."""
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    size: int = hf.get("head_dim") or head_dim or width // heads
    theta, scaling = _rope(hf)
    if hf.get("use_bidirectional_attention"):
        raise ModelError(
            "config.json: use_bidirectional_attention is set, a model that reads in both directions",
            field="config.json:use_bidirectional_attention",
            remedy="use one that writes from left to right",
        )
    return {
        "vocab_size": hf["vocab_size"],
        "num_layers": hf["num_hidden_layers"],
        "width": width,
        "ffn_width": hf["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": size,
        "max_positions": hf.get("max_position_embeddings", 2048),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "activation": activation(hf.get("hidden_activation") or hf.get("hidden_act") or "silu"),
        "qkv_bias": bool(hf.get("attention_bias")),
        "out_bias": bool(hf.get("attention_bias")),
        "ffn_bias": bool(hf.get("mlp_bias")),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_scale": size**-0.5,
        "tied_embeddings": hf.get("tie_word_embeddings", False),
    }


def _rope(hf: HF) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes rope_parameters; transformers 4 wrote rope_theta and rope_scaling.
    parameters = hf.get("rope_parameters") or {}
    theta = parameters.get("rope_theta", hf.get("rope_theta", 10_000.0))
    scaling = parameters or hf.get("rope_scaling") or {}
    for place in (parameters, scaling):
        check_fields(place, {name: hint for name, hint in _ROPE.items() if name in place}, FILE, ModelError)
    for place in (hf, parameters, scaling):
        if place.get("partial_rotary_factor") not in (None, 1):
            raise ModelError(
                f"config.json: partial_rotary_factor is {place['partial_rotary_factor']!r}, but only heads that are"
                " rotated whole are supported",
                field="config.json:partial_rotary_factor",
                remedy="use another model",
            )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(
            f"config.json: rope type {shown(kind)} is not supported",
            field="config.json:rope_type",
            remedy="use 'default' or 'llama3'",
        )
    return theta, RopeScaling(
        factor=scaling["factor"],
        low_frequency_factor=scaling["low_freq_factor"],
        high_frequency_factor=scaling["high_freq_factor"],
        original_max_positions=scaling["original_max_position_embeddings"],
    )


def activation(name: str) -> str:
    """What `DecoderConfig` calls an activation of a config.json. Raises ModelError for another one."""
    names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
    if name not in names:
        raise ModelError(
            f"config.json: activation {name!r} is not supported",
            field="config.json:hidden_act",
            remedy=f"use one of {', '.join(names)}",
        )
    return names[name]


def windowed_layers(hf: HF, rule: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers see a window: those that `layer_types` says, else those of which `rule` holds."""
    kinds = hf.get("layer_types")
    if kinds:
        return tuple(kind == "sliding_attention" for kind in kinds)
    return tuple(rule(i) for i in range(hf["num_hidden_layers"]))
