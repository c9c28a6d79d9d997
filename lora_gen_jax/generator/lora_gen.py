"""LoRA-Gen: prompts in, an adapter for the edge model out.

In: the cloud model's frozen weights and packed prompts. Out: `Generated`: the adapter of P prompts and, unless
the factors are generated directly, the gates [P, L, K] it was made from.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.lora import PromptLoRA, factor_a_init
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.generator.cloud import CloudEncoder, PackedPrompts
from lora_gen_jax.generator.router import Gates, Router, cv_squared, gate_entropy
from lora_gen_jax.generator.trained_module import Generated, TrainedModule

if TYPE_CHECKING:
    from lora_gen_jax.config import GeneratorConfig


class ExpertPool(nn.Module):
    """E low-rank pairs (A_e, B_e) for each of some weights; A Kaiming-uniform, B zero.

    Attributes:
        shapes: {site: (inputs, outputs)} of the weights, `DecoderConfig.ffn_shapes` for a decoder's FFN.
        num_experts, rank: E and R.
        layers: L, for a pool for every layer, with a leading L axis; None for one that all layers share.
    """

    shapes: Mapping[str, tuple[int, int]]
    num_experts: int
    rank: int
    layers: int | None = None

    @nn.compact
    def __call__(self) -> dict[str, dict[str, jax.Array]]:
        """{site: {"a": [(L,) E, inputs, R], "b": [(L,) E, R, outputs]}} in fp32."""
        lead = (self.num_experts,) if self.layers is None else (self.layers, self.num_experts)
        pool = {}
        for site, (inputs, outputs) in self.shapes.items():
            a = self.param(f"{site}_a", factor_a_init, (*lead, inputs, self.rank))
            b = self.param(f"{site}_b", nn.initializers.zeros_init(), (*lead, self.rank, outputs))
            pool[site] = {"a": a, "b": b}
        return pool


class DirectHead(nn.Module):
    """The ablation without a pool: an FFN turns each layer's meta token into all of that layer's factors.

    Attributes:
        config: of the edge model.
        rank: R.
        width: hidden width.
    """

    config: DecoderConfig
    rank: int
    width: int

    @nn.compact
    def __call__(self, meta_PLC: jax.Array) -> dict[str, dict[str, jax.Array]]:
        """[P, L, C] -> {site: {"a": [L, P, inputs, R], "b": [L, P, R, outputs]}} in fp32; b starts at zero."""
        dense = partial(nn.Dense, param_dtype=float)
        h_LPH = jax.nn.silu(dense(self.width, name="hidden")(meta_PLC)).transpose(1, 0, 2)
        factors = {}
        for site in self.config.ffn_sites:
            inputs, outputs = self.config.site_shape(site)
            # A constant Kaiming start plus what the prompt adds: generated from nothing, A would start at zero too.
            start = self.param(f"{site}_a_start", factor_a_init, (inputs, self.rank))
            a = dense(inputs * self.rank, name=f"{site}_a")(h_LPH).reshape(*h_LPH.shape[:2], inputs, self.rank)
            dense_b = dense(self.rank * outputs, kernel_init=nn.initializers.zeros_init(), name=f"{site}_b")
            b = dense_b(h_LPH).reshape(*h_LPH.shape[:2], self.rank, outputs)
            factors[site] = {"a": start[None, None] + a * inputs**-0.5, "b": b}
        return factors


class LoRAGen(TrainedModule):
    """The whole trainable part: its ``params`` and ``batch_stats`` are what a checkpoint holds.

    ``LoRAGen(...).apply(variables, frozen_cloud, prompts)`` is pure; with ``train=True`` pass
    ``mutable=["batch_stats"]`` and the rngs "dropout" and "gumbel".

    Attributes:
        decoder: the cloud model.
        edge: of the edge model.
        settings: of the generator.
        meta_start: as `CloudEncoder.meta_start`.
    """

    decoder: Decoder
    edge: DecoderConfig
    settings: "GeneratorConfig"
    meta_start: int | None = None

    reader = "cloud"

    @nn.compact
    def __call__(self, frozen: Any, prompts: PackedPrompts, train: bool = False) -> Generated:
        s, scale = self.settings, self.settings.alpha / self.settings.rank
        meta_PLC = self.encoder(name="cloud")(frozen, prompts, train)
        if s.generator == "direct":
            factors = DirectHead(self.edge, s.rank, s.direct_width, name="direct")(meta_PLC)
            return Generated(PromptLoRA(factors, scale=scale, dropout_rate=s.dropout), None)
        router = Router(
            num_experts=s.num_experts,
            top_k=s.top_k,
            width=s.router_width or self.decoder.config.width,
            routing=s.routing,
            temperature=s.gumbel_temperature,
            batch_norm=s.batch_norm,
            by_layer=s.batch_norm_by_layer,
            heads=self.edge.num_layers if s.router_heads == "per_layer" else None,
            point=s.router_point,
            standardize=s.standardize,
            train_reader=s.train_reader,
            dropout=s.router_dropout,
            variance=s.batch_norm_variance,
            name="router",
        )
        logits_PLE = router.logits(meta_PLC, train)
        gates = router.gates(logits_PLE, train)
        layers = self.edge.num_layers if s.pool == "per_layer" else None
        pool = ExpertPool(self.edge.ffn_shapes, s.num_experts, s.rank, layers, name="pool")()
        return Generated(gated_adapter(gates, pool, s), gates, logits_PLE)

    def encoder(self, **place: Any) -> CloudEncoder:
        """The cloud side, as a part of this module (``name=``) or by itself (``parent=None``)."""
        return CloudEncoder(self.decoder, self.edge.num_layers, self.settings, self.meta_start, **place)

    def auxiliary(self, generated: Generated, records: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        """α_cv·CV² of the experts' use; nothing without gates."""
        if generated.gates is None:
            return 0.0, {}
        if self.settings.routing == "linear":
            return 0.0, {}  # no choice to balance
        gates_PLE = generated.gates.dense()
        cv = cv_squared(gates_PLE)
        metrics = {"cv": cv, "gate_entropy": gate_entropy(gates_PLE)}
        return self.settings.cv_coefficient * cv, metrics


def gated_adapter(gates: Gates, pool: Any, settings: "GeneratorConfig") -> GatedPool:
    """The adapter of P prompts from their gates [P, L, K] and a pool."""
    per_layer = settings.pool == "per_layer"
    scanned = {"gates": gates.by_layer()}
    return GatedPool(
        scanned={**scanned, "pool": pool} if per_layer else scanned,
        shared=None if per_layer else {"pool": pool},
        scale=settings.alpha / settings.rank,
        mix=settings.mix,
        dropout_rate=settings.dropout,
    )
