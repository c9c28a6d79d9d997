"""Where each parameter of a decoder is found in a Hugging Face checkpoint.

In: a `DecoderConfig`. Out: one `Leaf` per array of the parameter tree, with its path there, its tensor name in the
checkpoint and its shape. Readers use this table to load; an exporter can run it the other way round.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.families import FAMILIES


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree.

    Attributes:
        path: keys from the root of the tree, as ("layers", "ffn", "up", "kernel").
        name: tensor name in a Hugging Face checkpoint; holds "{layer}" when the leaf stacks all layers.
        shape: of one layer in the tree (kernels are [inputs, outputs]), without the leading layer axis.
        transpose: the checkpoint stores the axes the other way round ([outputs, inputs]).
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a leading layer axis."""
        return self.path[0] == "layers"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the checkpoint."""
        return self.shape[::-1] if self.transpose else self.shape

    def full_shape(self, num_layers: int) -> tuple[int, ...]:
        """Shape of the whole leaf in the tree, with its layer axis if it has one."""
        return (num_layers, *self.shape) if self.stacked else self.shape

    def tensor_names(self, num_layers: int) -> list[str]:
        """Names of its tensors in the checkpoint: one per layer, or one in all."""
        return [self.name.format(layer=i) for i in range(num_layers)] if self.stacked else [self.name]


def leaves(config: DecoderConfig) -> Iterator[Leaf]:
    """Every parameter of a decoder of this config, in the order embeddings, layers, final norm, unembedding."""
    names = FAMILIES[config.family].names
    base, width = names["base"], config.width
    yield Leaf(("embed", "embedding"), base + "embed_tokens.weight", (config.vocab_size, width))
    if config.rope_theta is None:
        rows = config.max_positions + config.learned_position_offset
        yield Leaf(("positions", "embedding"), base + "embed_positions.weight", (rows, width))
    yield from _layer_leaves(config, names)
    yield from _norm(config, ("final_norm",), base + names["final_norm"])
    if not config.tied_embeddings:
        yield Leaf(("unembed", "kernel"), "lm_head.weight", (width, config.vocab_size), transpose=True)


def _layer_leaves(config: DecoderConfig, names: Mapping[str, str]) -> Iterator[Leaf]:
    layer = names["base"] + "layers.{layer}."
    norms = ["attention_norm", "ffn_norm"] + (["post_attention_norm", "post_ffn_norm"] if config.post_norms else [])
    for norm in norms:
        yield from _norm(config, ("layers", norm), layer + names[norm])
    for site in ("q", "k", "v", "o"):
        bias = config.out_bias if site == "o" else config.qkv_bias
        name = layer + names.get(site, f"self_attn.{site}_proj")
        yield from _linear(("layers", "attention", site), name, config.site_shape(site), bias)
    for site in config.ffn_sites:
        yield from _linear(("layers", "ffn", site), layer + names[site], config.site_shape(site), config.ffn_bias)


def _norm(config: DecoderConfig, path: tuple[str, ...], name: str) -> Iterator[Leaf]:
    yield Leaf((*path, "scale"), name + ".weight", (config.width,))
    if config.norm == "layer":
        yield Leaf((*path, "bias"), name + ".bias", (config.width,))


def _linear(path: tuple[str, ...], name: str, shape: tuple[int, int], bias: bool) -> Iterator[Leaf]:
    yield Leaf((*path, "kernel"), name + ".weight", shape, transpose=True)
    if bias:
        yield Leaf((*path, "bias"), name + ".bias", shape[1:])
