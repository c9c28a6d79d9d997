"""A generated update with a LoRA of each prompt's own beside it: what refining by factors leaves.

In: a `GatedPool` of P prompts and factors a [L, P, inputs, X], b [L, P, X, outputs] by site. Adds both updates.
"""

from typing import Any

import jax

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.lora import PromptLoRA
from lora_gen_jax.adapters.protocol import PerPrompt
from lora_gen_jax.generator.router import Gates


class RefinedPool(PerPrompt):
    """ΔW of the gates plus A·B; rows of the batch are grouped by prompt.

    Attributes:
        scanned: {"pool": what `GatedPool` has there, "factors": {site: {"a": [L, P, inputs, X], "b": …}}}.
        shared: as of `GatedPool`.
        form: that pool without its arrays.
    """

    scanned: Any
    shared: Any
    form: GatedPool

    @classmethod
    def of(cls, pool: GatedPool, factors: Any) -> "RefinedPool":
        """A pool's update and the factors beside it, {site: {"a", "b"}}."""
        form = pool.replace(scanned=None, shared=None)
        return cls({"pool": pool.scanned, "factors": factors}, pool.shared, form)

    @property
    def generated(self) -> GatedPool:
        """The generated update, without the factors."""
        return self.form.replace(scanned=self.scanned["pool"], shared=self.shared, operands=self.operands)

    @property
    def factors(self) -> PromptLoRA:
        """The factors, without the generated update."""
        return PromptLoRA(self.scanned["factors"], scale=1.0, operands=self.operands)

    def delta(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array | None:
        """The sum of what both add, [B, T, outputs]."""
        return _sum(self.generated.delta(site, x_BTD, key), self.factors.delta(site, x_BTD, None))

    def weight_delta(self, site: str) -> jax.Array | None:
        """ΔW of one layer in fp32, [inputs, outputs]; for a single prompt."""
        return _sum(self.generated.weight_delta(site), self.factors.weight_delta(site))

    @property
    def prompts(self) -> int:
        """P."""
        return self.generated.prompts

    def with_gates(self, gates: Gates) -> "RefinedPool":
        """The same factors beside the update of other gates, as `GatedPool.with_gates`."""
        return RefinedPool.of(self.generated.with_gates(gates), self.scanned["factors"])

    def take(self, index: Any) -> "RefinedPool":
        """The adapter of the prompts that `index` (integers) names, in that order."""
        return RefinedPool.of(self.generated.take(index), self.factors.take(index).scanned)


def _sum(x: jax.Array | None, y: jax.Array | None) -> jax.Array | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y
