"""Multiply-adds (MACs) of reading, of decoding and of specializing: by formula, and as the compiler counts them.

In: decoder configs and the sizes of a batch; or a lowered program. Out: numbers of MACs; one MAC is two flops.

The formula counts matmuls: linear layers, attention's two (every slot of the cache, masked ones too, as they are
computed), logits. The compiler's figure comes from the program that JAX hands to it, before optimization: there a
matmul is a `dot` on every platform, whereas afterwards it may be a library call without a cost. Two numbers are taken
from that program: its `dot`s, which are what the formula says, and XLA's cost analysis, which adds every elementwise
operation (norms, softmax, rotation, activation) as a flop an element. The analysis counts a scanned body once whatever
its length, so the layers are unrolled first.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lora_gen_jax.buckets import bucket
from lora_gen_jax.config import GeneratorConfig
from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.generator.cloud import CLOUD_SITES
from lora_gen_jax.inference.edge_model import logits_at
from lora_gen_jax.inference.hlo import parse
from lora_gen_jax.inference.matmuls import matmul_flops

# The two counts of matmuls may differ by this share.
TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Pass:
    """The sizes of one forward pass.

    Attributes:
        rows: B.
        tokens: read per row.
        slots: of each row's own cache, these tokens' among them.
        kept: slots of a prefix that all rows read; 0 without.
        logits: positions per row whose logits are computed.
        adapter: MACs a token of an adapter that is not merged; 0 for merged ones.
    """

    rows: int
    tokens: int
    slots: int
    kept: int = 0
    logits: int = 1
    adapter: int = 0


@dataclasses.dataclass(frozen=True)
class Macs:
    """MACs by part."""

    linear: int
    attention: int
    logits: int
    adapter: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.logits + self.adapter


def linear_macs(config: DecoderConfig) -> int:
    """MACs of all linear layers for one token, the unembedding not among them."""
    sites = ("q", "k", "v", "o", *config.ffn_sites)
    return config.num_layers * sum(inputs * outputs for inputs, outputs in map(config.site_shape, sites))


def side_widths(config: DecoderConfig, sites: Iterable[str]) -> list[int]:
    """Inputs + outputs of each linear layer: MACs of a side path of rank 1 for one token of one layer."""
    return [sum(config.site_shape(site)) for site in sites]


def pass_macs(config: DecoderConfig, sizes: Pass) -> Macs:
    """B·(T·Σ inputs·outputs + L·2·T·S·N·H + logits·D·V) and what an adapter adds; S counts a prefix's slots, too."""
    tokens = sizes.rows * sizes.tokens
    return Macs(
        linear=tokens * linear_macs(config),
        attention=2 * tokens * (sizes.kept + sizes.slots) * config.num_heads * config.head_dim * config.num_layers,
        logits=sizes.rows * sizes.logits * config.width * config.vocab_size,
        adapter=tokens * sizes.adapter,
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one answer takes: tokens read, tokens kept before them, new tokens, rows.

    Attributes:
        tokens: read for the answer.
        kept: of a prefix whose keys and values are there already.
        new: generated; the prefill gives the first, a decoding step each of the others.
        rows: B.
        adapter: as `Pass.adapter`.
    """

    tokens: int
    kept: int
    new: int
    rows: int = 1
    adapter: int = 0

    @property
    def executed(self) -> tuple[Pass, Pass]:
        """The prefill and one decoding step as they run: lengths padded to their buckets."""
        read, kept = bucket(self.tokens), bucket(self.kept) if self.kept else 0
        prefill = Pass(self.rows, read, read, kept, adapter=self.adapter)
        return prefill, Pass(self.rows, 1, bucket(read + self.new), kept, adapter=self.adapter)


def answer_macs(config: DecoderConfig, sizes: Sizes) -> tuple[int, int]:
    """(prefill, all decoding steps) of one answer, nothing padded."""
    before = sizes.kept + sizes.tokens
    prefill = pass_macs(config, Pass(sizes.rows, sizes.tokens, before, adapter=sizes.adapter)).total
    steps = (Pass(sizes.rows, 1, before + i, adapter=sizes.adapter) for i in range(1, sizes.new))
    return prefill, sum(pass_macs(config, step).total for step in steps)


def cloud_macs(cloud: DecoderConfig, settings: GeneratorConfig, rows: int, length: int) -> Macs:
    """The cloud model's pass with its LoRA; it computes no logits."""
    side = settings.cloud_rank * cloud.num_layers * sum(side_widths(cloud, CLOUD_SITES))
    return pass_macs(cloud, Pass(rows, length, length, logits=0, adapter=side))


def direct_macs(cloud: DecoderConfig, edge: DecoderConfig, settings: GeneratorConfig) -> int:
    """The head of direct generation for one prompt."""
    factors = settings.rank * sum(side_widths(edge, edge.ffn_sites))
    return edge.num_layers * settings.direct_width * (cloud.width + factors)


def specialize_macs(cloud: DecoderConfig, edge: DecoderConfig, settings: GeneratorConfig, length: int) -> int:
    """MACs of the cloud's pass over one prompt of `length` slots (its meta tokens and padding among them) and the
    router, or the head of direct generation."""
    body = cloud_macs(cloud, settings, 1, length).total
    if settings.generator == "direct":
        return body + direct_macs(cloud, edge, settings)
    hidden = settings.router_width or cloud.width
    return body + edge.num_layers * hidden * (cloud.width + settings.num_experts)


def merge_macs(edge: DecoderConfig, settings: GeneratorConfig) -> int:
    """MACs of computing ΔW of every FFN site and layer for one prompt: inputs·outputs·(K·R) each."""
    shapes = [edge.site_shape(site) for site in edge.ffn_sites]
    if settings.generator == "direct":
        return edge.num_layers * settings.rank * sum(a * b for a, b in shapes)
    if settings.mix == "factors":
        mixing = settings.num_experts * settings.rank * sum(a + b for a, b in shapes)
        return edge.num_layers * (mixing + settings.rank * sum(a * b for a, b in shapes))
    return edge.num_layers * settings.active_experts * settings.rank * sum(a * b for a, b in shapes)


@dataclasses.dataclass(frozen=True)
class Counted:
    """MACs of a program before optimization.

    Attributes:
        matmuls: of its `dot`s.
        everything: flops of XLA's cost analysis, halved; None where the platform gives none.
    """

    matmuls: int
    everything: float | None


def lower_pass(decoder: Decoder, params: Any, adapter: Any, sizes: Pass) -> Any:
    """One forward pass as prefill and decoding run it, the drawing of a token left out; its cache is written in place.

    Args:
        decoder: as it runs.
        params, adapter: arrays, or their shapes.
        sizes: of the pass; `logits` must be 1.

    Returns:
        a `jax.stages.Lowered`.
    """
    empty = functools.partial(KVCache.empty, decoder.config, dtype=decoder.dtype)

    def forward(params: Any, adapter: Any, tokens_BT: jax.Array, cache: KVCache, prefix: KVCache | None) -> Any:
        # Which positions the tokens have is data, and any array of integers will do.
        hidden, after = decoder.apply(
            {"params": params}, tokens_BT, tokens_BT, adapter=adapter, cache=cache, prefix=prefix
        )
        assert isinstance(hidden, jax.Array)
        return logits_at(decoder, params, hidden[:, -1]), after

    tokens = jax.ShapeDtypeStruct((sizes.rows, sizes.tokens), jnp.int32)
    cache = jax.eval_shape(lambda: empty(rows=sizes.rows, slots=sizes.slots))
    prefix = jax.eval_shape(lambda: empty(rows=1, slots=sizes.kept)) if sizes.kept else None
    return jax.jit(forward, donate_argnums=3).lower(params, adapter, tokens, cache, prefix)


def count_pass(decoder: Decoder, params: Any, adapter: Any, sizes: Pass) -> Counted:
    """MACs of `lower_pass` with all layers unrolled; nothing is compiled."""
    return count(lower_pass(decoder.clone(unroll=decoder.config.num_layers, remat="none"), params, adapter, sizes))


def count(lowered: Any) -> Counted:
    """MACs of a `jax.stages.Lowered`; XLA's analysis counts the body of a while loop once."""
    analysis = lowered.cost_analysis()
    flops = None if not analysis else analysis.get("flops")
    return Counted(dot_macs(lowered), None if flops is None else flops / 2)


def dot_macs(lowered: Any) -> int:
    """MACs of all matmuls of a `jax.stages.Lowered`, each as often as it runs."""
    return round(matmul_flops(parse(lowered.compiler_ir("hlo").as_hlo_module().to_string())) / 2)


def difference(formula: int, counted: int) -> float:
    """By what share the compiler's number exceeds the formula's."""
    return counted / formula - 1
