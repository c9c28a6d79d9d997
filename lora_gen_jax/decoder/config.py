"""What distinguishes one decoder family from another, as data.

In: the dictionary of a Hugging Face ``config.json``. Out: a `DecoderConfig`, which is all the `Decoder` knows.
"""

import dataclasses
from typing import Any, Literal

from lora_gen_jax.decoder.families import FAMILIES
from lora_gen_jax.decoder.family import FILE, LARGEST_SIZE, POSITIVE, RopeScaling
from lora_gen_jax.errors import ModelError
from lora_gen_jax.untrusted import check_fields, shown

# Fields of a config.json that count something.
SIZES = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "ffn_dim", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings")
MOST_LAYERS = 10_000
# Its other fields that are read, where it has them.
_FIELDS = {
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "query_pre_attn_scalar"), POSITIVE),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), POSITIVE | None),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict | None),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), str | None),
    **dict.fromkeys(("sliding_window", "max_window_layers", "word_embed_proj_dim"), int | None),
    "layer_types": list[str] | None,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder-only language model.

    Sizes are numbers of elements; letters refer to the package's shape glossary.

    Attributes:
        family: one of `FAMILIES`; used for reading weights and for error messages only, never inside the model.
        vocab_size: V, the rows of the embedding (padded rows included).
        num_layers: L.
        width: D, the residual stream.
        ffn_width: F.
        num_heads: N query heads.
        num_kv_heads: G key/value heads; divides N.
        head_dim: H per head.
        max_positions: longest sequence the model was built for.
        norm: root-mean-square norm, or LayerNorm with a bias.
        norm_eps: added to the variance.
        norm_offset: added to the RMS scale; Gemma stores w and applies (1 + w).
        post_norms: also normalize the outputs of attention and FFN (Gemma 2).
        activation: of the FFN.
        gated_ffn: gate, up and down matrices; otherwise only up and down (OPT).
        qkv_bias, out_bias, ffn_bias: whether those linear layers add a bias.
        rope_theta: rotary base; None means learned positions.
        rope_scaling: Llama 3's scaling, if any.
        learned_position_offset: rows skipped at the start of a learned position table (OPT: 2).
        attention_scale: multiplies query·key.
        attention_softcap, logit_softcap: c in c·tanh(x/c); None means no cap.
        sliding_window: keys visible to a query in a windowed layer; None means all.
        windowed_layers: per layer, whether `sliding_window` applies to it.
        embedding_scale: multiplies input embeddings (Gemma: √D).
        tied_embeddings: the unembedding is the embedding transposed.
    """

    family: str
    vocab_size: int
    num_layers: int
    width: int
    ffn_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    gated_ffn: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    rope_theta: float | None = 10_000.0
    rope_scaling: RopeScaling | None = None
    learned_position_offset: int = 0
    attention_scale: float = 0.125
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    windowed_layers: tuple[bool, ...] = ()
    embedding_scale: float = 1.0
    tied_embeddings: bool = False

    @property
    def learned_positions(self) -> bool:
        """Whether positions are rows of a learned table (OPT) and not rotations."""
        return self.rope_theta is None

    @property
    def ffn_sites(self) -> tuple[str, ...]:
        """Linear layers of the FFN, in the order in which they are applied."""
        return ("gate", "up", "down") if self.gated_ffn else ("up", "down")

    @property
    def ffn_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each of `ffn_sites`."""
        return {site: self.site_shape(site) for site in self.ffn_sites}

    def site_shape(self, site: str) -> tuple[int, int]:
        """(inputs, outputs) of a linear layer: q, k, v, o, gate, up or down."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {
            "q": (self.width, queries),
            "k": (self.width, keys),
            "v": (self.width, keys),
            "o": (queries, self.width),
            "gate": (self.width, self.ffn_width),
            "up": (self.width, self.ffn_width),
            "down": (self.ffn_width, self.width),
        }
        if site not in shapes or (site == "gate" and not self.gated_ffn):
            known = [s for s in shapes if s != "gate" or self.gated_ffn]
            raise ModelError(
                f"a {self.family} layer has no linear layer {site!r}; it has {', '.join(known)}", field="site"
            )
        return shapes[site]

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "DecoderConfig":
        """Reads the dictionary of a ``config.json``, as written by transformers 4 or 5.

        Raises:
            ModelError: for a family, rotary embedding, attention or activation that is not supported, a missing field,
                or a size that no model can have.
        """
        family = hf.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ModelError(
                f"config.json: model_type {shown(family)} is not supported",
                field="config.json:model_type",
                remedy=f"use one of {', '.join(FAMILIES)}",
            )
        hf = {field: value for field, value in hf.items() if value is not None or field not in SIZES}
        for field in SIZES:
            if (size := hf.get(field)) is not None and (type(size) is not int or size < 1):
                raise ModelError(
                    f"config.json: {field} is {shown(size)}; it must be a whole number of at least 1",
                    field=f"config.json:{field}",
                )
            most = MOST_LAYERS if field == "num_hidden_layers" else LARGEST_SIZE
            if size is not None and size > most:
                raise ModelError(
                    f"config.json: {field} is {shown(size)}; at most {most}", field=f"config.json:{field}", code="range"
                )
        check_fields(hf, {name: hint for name, hint in _FIELDS.items() if name in hf}, FILE, ModelError)
        try:
            config = cls(family=family, **FAMILIES[family].fields(hf))
        except KeyError as error:
            raise ModelError(
                f"config.json of this {family} model lacks the field {error.args[0]!r}",
                field=f"config.json:{error.args[0]}",
            ) from error
        if config.rope_theta is not None and config.head_dim % 2:
            raise ModelError(
                f"config.json: head_dim is {config.head_dim}; heads whose halves are rotated have an even one",
                field="config.json:head_dim",
            )
        if config.windowed_layers and len(config.windowed_layers) != config.num_layers:
            raise ModelError(
                f"config.json: layer_types has {len(config.windowed_layers)} entries for {config.num_layers} layers",
                field="config.json:layer_types",
            )
        if config.num_heads % config.num_kv_heads:
            raise ModelError(
                f"config.json: num_attention_heads = {config.num_heads} is not a multiple of num_key_value_heads ="
                f" {config.num_kv_heads}",
                field="config.json:num_key_value_heads",
            )
        if not hf.get("head_dim") and FAMILIES[family].head_dim is None and config.width % config.num_heads:
            raise ModelError(
                f"config.json: hidden_size = {config.width} is not a multiple of num_attention_heads ="
                f" {config.num_heads}, and there is no head_dim",
                field="config.json:hidden_size",
            )
        return config
