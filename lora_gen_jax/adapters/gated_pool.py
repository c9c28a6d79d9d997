"""LoRA-Gen's adapter: every prompt weighs the experts of a pool by its gates.

In: gates [L, P, K] and a pool of E pairs (A_e, B_e) per FFN site. Adds ΔW = (α/r)·Σ_e G[l, p, e]·A_e·B_e to the
FFN's weights, as a side path while training and for mixed-task batches, or merged (`merge`).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from lora_gen_jax.adapters.lora import dropout, group_rows, require_single
from lora_gen_jax.adapters.protocol import PerPrompt
from lora_gen_jax.decoder.product import kept, product
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.router import Gates

FEW_TOKENS = 32
"""Below this many tokens a prompt, copying its experts together costs more than computing all (SmolLM2, two cores)."""


class GatedPool(PerPrompt):
    """Gates over a pool of LoRA experts; rows of the batch are grouped by prompt.

    Attributes:
        scanned: {"gates": `Gates` [L, P, K]}, and {"pool": …} with a leading L when every layer has its own pool.
        shared: {"pool": {site: {"a": [E, inputs, R], "b": [E, R, outputs]}}} when all layers share one pool.
        scale: α/r.
        mix: "products" sums G·A·B (equation 8); "factors" multiplies (ΣG·A)·(ΣG·B), which adds cross terms.
        dropout_rate: on the LoRA input.
    """

    scanned: Any
    shared: Any
    scale: float = struct.field(pytree_node=False)
    mix: Literal["products", "factors"] = struct.field(pytree_node=False, default="products")
    dropout_rate: float = struct.field(pytree_node=False, default=0.0)

    @property
    def pool(self) -> Any:
        return (self.shared or self.scanned)["pool"]

    @property
    def gates(self) -> Gates:
        """[L, P, K]; inside a layer [P, K]."""
        return self.scanned["gates"]

    def pairs(self, site: str) -> tuple[jax.Array, jax.Array]:
        """(A [E, D, R], B [E, R, F]) of one layer.

        Raises:
            ConfigError: when the gates are of another number of experts: an index beyond the last would read the last.
        """
        a, b = self.pool[site]["a"], self.pool[site]["b"]
        if self.gates.experts != a.shape[0]:
            raise ConfigError(
                f"the gates are of {self.gates.experts} experts and the pool has {a.shape[0]}: they belong to another"
                " generator",
                field="gates",
            )
        return a, b

    def delta(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array | None:
        """(α/r)·Σ_e G_pe·B_e·A_e·dropout(x) for the prompt p of each row, [B, T, outputs]."""
        if site not in self.pool:
            return None
        if (low := self.lowered(site, x_BTD, key)) is not None:
            return product(*low, self.operands)
        # What is gathered or mixed per prompt is rounded after it: gradients are summed over prompts in fp32.
        a, b = self.pairs(site)
        x_PSD = group_rows(dropout(x_BTD, self.dropout_rate, key), len(self.gates.weight))
        if self.mix == "factors":
            gates_PE = self.gates.dense()
            h = self._first(x_PSD, jnp.einsum("pe,edr->pdr", gates_PE, a)) * jnp.asarray(self.scale, x_BTD.dtype)
            y_PSF = product(h, jnp.einsum("pe,erf->prf", gates_PE, b), self.operands)
        else:
            y_PSF = self._chosen_experts(x_PSD, a, b)
        return y_PSF.reshape(*x_BTD.shape[:2], -1)

    def lowered(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
        """All experts' A_e·dropout(x), each times its gate, and all B_e: where all experts are computed."""
        if site not in self.pool:
            return None
        a_EDR, b_ERF = self.pairs(site)
        (E, D, R), P, (B, T, _) = a_EDR.shape, len(self.gates.weight), x_BTD.shape
        if not self._side_by_side(P, B // P * T, E):
            return None
        x_PSD, gates_PE = group_rows(dropout(x_BTD, self.dropout_rate, key), P), self.gates.dense()
        h_PSX = self._first(x_PSD, a_EDR.transpose(1, 0, 2).reshape(D, E * R))
        if self.mix == "factors":
            weighed_PSX = h_PSX * columns(gates_PE, R, x_PSD.dtype)
            h_PSX = jnp.tile(jnp.sum(weighed_PSX.reshape(*h_PSX.shape[:2], E, R), axis=2), (1, 1, E))
        h_PSX = h_PSX * columns(gates_PE * self.scale, R, x_PSD.dtype)
        return h_PSX.reshape(B, T, E * R), b_ERF.reshape(E * R, -1)

    def _side_by_side(self, prompts: int, tokens: int, experts: int) -> bool:
        """Whether to compute all experts for every token: K near E, or many prompts of few tokens each.

        A prompt's own factors are K of the pool's E pairs, copied together for its tokens. Where a prompt has few
        tokens (decoding has one a row), the copies cost more than the arithmetic that they save. With many tokens a
        column of the copies costs 2.4 times one of the pool (docs/decisions.md).
        """
        if self.mix == "products" and computed_experts(experts, self.gates.active) == experts:
            return True
        return prompts * self.gates.active > experts and tokens < FEW_TOKENS

    def _chosen_experts(self, x_PSD: jax.Array, a_EDR: jax.Array, b_ERF: jax.Array) -> jax.Array:
        """One pair of products per prompt, K/E of the work: [P, S, F].

        Copied are whole rows of both factors, [K·R, D] and [K·R, F]: columns of A would be copied number by number.
        """
        index_PK, weight_PK = self.gates.index, self.gates.weight
        P, D, F, R = len(weight_PK), x_PSD.shape[-1], b_ERF.shape[-1], a_EDR.shape[-1]
        a_PXD = a_EDR.swapaxes(1, 2)[index_PK].reshape(P, -1, D)
        h_PSX = self._first(x_PSD, a_PXD.swapaxes(1, 2)) * columns(weight_PK * self.scale, R, x_PSD.dtype)
        return product(h_PSX, b_ERF[index_PK].reshape(P, -1, F), self.operands)

    def _first(self, x_PSD: jax.Array, a: jax.Array) -> jax.Array:
        return kept(product(x_PSD, a, self.operands))

    def weight_delta(self, site: str) -> jax.Array | None:
        """ΔW of one layer in fp32, [inputs, outputs]; for a single prompt."""
        if site not in self.pool:
            return None
        a, b = (x.astype(float) for x in self.pairs(site))
        require_single(len(self.gates.weight))
        gates = jax.tree.map(lambda x: x[0], self.gates)
        if self.mix == "factors":
            return mixed_factors(gates.dense().astype(float), a, b, self.scale)
        return gated_product(gates.weight.astype(float), gates.chosen(a), gates.chosen(b), self.scale)

    @property
    def prompts(self) -> int:
        """P."""
        return self.gates.shape[1]

    def with_gates(self, gates: Gates) -> "GatedPool":
        """The same pool behind other gates [L, P, K]."""
        return self.replace(scanned={**self.scanned, "gates": gates})

    def take(self, index: Any) -> "GatedPool":
        """The adapter of the prompts that `index` (integers) names, in that order."""
        return self.with_gates(jax.tree.map(lambda x: x[:, index], self.gates))


def computed_experts(experts: int, top_k: int) -> int:
    """How many experts are computed for every token of a long row: all, where copying the K chosen ones costs more."""
    return experts if experts <= 2 * top_k else top_k


def columns(weight_PX: jax.Array, rank: int, dtype: Any) -> jax.Array:
    """The weight of every column between an adapter's two products, [P, 1, X·R]: each expert has R of them."""
    return jnp.repeat(weight_PX, rank, axis=1)[:, None].astype(dtype)


def gated_product(gates_E: jax.Array, a_EDR: jax.Array, b_ERF: jax.Array, scale: float) -> jax.Array:
    """Equation 8: ΔW = scale·Σ_e G_e·A_e·B_e, [D, F], as one matmul of rank E·R.

    Exact in the factors' type: by default TPUs and GPUs round the operands of fp32 products to fewer bits.
    """
    E, D, R = a_EDR.shape
    a = (a_EDR * (gates_E * scale)[:, None, None]).transpose(1, 0, 2).reshape(D, E * R)
    return jnp.matmul(a, b_ERF.reshape(E * R, -1), precision="highest")


def mixed_factors(gates_E: jax.Array, a_EDR: jax.Array, b_ERF: jax.Array, scale: float) -> jax.Array:
    """The variant with cross terms: ΔW = scale·(Σ_e G_e·A_e)·(Σ_e G_e·B_e), [D, F], of rank R."""
    a_DR = jnp.einsum("e,edr->dr", gates_E, a_EDR, precision="highest")
    b_RF = jnp.einsum("e,erf->rf", gates_E, b_ERF, precision="highest")
    return jnp.matmul(scale * a_DR, b_RF, precision="highest")
