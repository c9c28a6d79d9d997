"""LoRA: y += (α/r)·B·A·dropout(x), one pair per layer and site.

In: factors a [L, inputs, R] and b [L, R, outputs] by site. The cloud model's own q and v LoRA is this adapter,
and so is one prompt's LoRA from direct generation, whose factors carry a prompt axis: a [L, P, inputs, R].
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from lora_gen_jax.adapters.protocol import AdapterBase, PerPrompt
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.product import kept, product
from lora_gen_jax.errors import ConfigError


def factor_a_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A of any number of stacked matrices [..., inputs, R]: U(±1/√inputs) for each."""
    init = jax.nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", in_axis=-2, out_axis=-1, batch_axis=tuple(range(len(shape) - 2))
    )
    return init(key, shape, float)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x and scales up the rest; nothing without a key.

    What falls is decided by a hash of the key, the row and the column: a few operations that become part of what reads
    x, where random bits of JAX's own are passes of their own, a tenth of a training step on a CPU.
    """
    if key is None or rate == 0:
        return x
    words = jax.random.key_data(key).reshape(-1)
    place = jnp.zeros((1,) * x.ndim, jnp.uint32)
    for axis, size in enumerate(x.shape[:-1]):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, (*x.shape[:-1], 1), axis)
    row, column = (
        place ^ words[0],
        jax.lax.broadcasted_iota(jnp.uint32, (*(1,) * (x.ndim - 1), x.shape[-1]), x.ndim - 1),
    )
    bits = _mixed(_mixed(row) ^ words[-1]) + _mixed(_mixed(column ^ words[-1]) ^ words[0])
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    kept_x = x * jnp.asarray(1 / (1 - rate), x.dtype)
    return jnp.where(bits >= jnp.uint32(round(rate * 2**32)), kept_x, jnp.zeros((), x.dtype))


def _mixed(bits: jax.Array) -> jax.Array:
    """The last step of MurmurHash3: every bit of the input moves about half of the output's."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def trained_factors(module: nn.Module, config: DecoderConfig, sites: Sequence[str], rank: int) -> dict[str, Any]:
    """Parameters of a module: {site: {"a": [L, inputs, R], "b": [L, R, outputs]}}; A Kaiming-uniform, B zero."""
    factors = {}
    for site in sites:
        inputs, outputs = config.site_shape(site)
        a = module.param(f"{site}_a", factor_a_init, (config.num_layers, inputs, rank))
        b = module.param(f"{site}_b", nn.initializers.zeros_init(), (config.num_layers, rank, outputs))
        factors[site] = {"a": a, "b": b}
    return factors


class LoRA(AdapterBase):
    """The same factors for every row of the batch.

    Attributes:
        scanned: {site: {"a": [L, inputs, R], "b": [L, R, outputs]}}.
        scale: α/r.
        dropout_rate: on the LoRA input.
        shared: nothing.
    """

    scanned: Any
    scale: float = struct.field(pytree_node=False)
    dropout_rate: float = struct.field(pytree_node=False, default=0.0)
    shared: Any = None

    def delta(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array | None:
        """(α/r)·B·A·dropout(x), [B, T, outputs]."""
        low = self.lowered(site, x_BTD, key)
        return None if low is None else product(*low, self.operands)

    def lowered(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
        """(α/r)·A·dropout(x) and B."""
        if site not in self.scanned:
            return None
        a, b = (self.scanned[site][name] for name in ("a", "b"))
        h_BTR = kept(product(dropout(x_BTD, self.dropout_rate, key), a, self.operands))
        return h_BTR * jnp.asarray(self.scale, x_BTD.dtype), b

    def weight_delta(self, site: str) -> jax.Array | None:
        """(α/r)·A·B of one layer in fp32, [inputs, outputs]."""
        if site not in self.scanned:
            return None
        a, b = (self.scanned[site][name].astype(float) for name in ("a", "b"))
        return self.scale * jnp.matmul(a, b, precision="highest")


class PromptLoRA(PerPrompt):
    """Other factors for every prompt: what direct generation emits.

    Rows of the batch are grouped by prompt: row i belongs to prompt i // (B / P).

    Attributes:
        scanned: {site: {"a": [L, P, inputs, R], "b": [L, P, R, outputs]}}.
        scale: α/r.
        dropout_rate: on the LoRA input.
        shared: nothing.
    """

    scanned: Any
    scale: float = struct.field(pytree_node=False)
    dropout_rate: float = struct.field(pytree_node=False, default=0.0)
    shared: Any = None

    def delta(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array | None:
        """(α/r)·B_p·A_p·dropout(x) for the prompt p of each row, [B, T, outputs]."""
        if site not in self.scanned:
            return None
        a, b = (self.scanned[site][name] for name in ("a", "b"))
        x_PSD = group_rows(dropout(x_BTD, self.dropout_rate, key), a.shape[0])
        h_PSR = kept(product(x_PSD, a, self.operands))
        y = product(h_PSR * jnp.asarray(self.scale, x_BTD.dtype), b, self.operands)
        return y.reshape(*x_BTD.shape[:2], -1)

    def weight_delta(self, site: str) -> jax.Array | None:
        """(α/r)·A·B of one layer in fp32, [inputs, outputs]; for a single prompt."""
        if site not in self.scanned:
            return None
        a, b = (self.scanned[site][name].astype(float) for name in ("a", "b"))
        require_single(a.shape[0])
        return self.scale * jnp.matmul(a[0], b[0], precision="highest")

    @property
    def prompts(self) -> int:
        """P."""
        return jax.tree.leaves(self.scanned)[0].shape[1]

    def take(self, index: Any) -> "PromptLoRA":
        """The adapter of the prompts that `index` (integers) names, in that order."""
        return self.replace(scanned=jax.tree.map(lambda x: x[:, index], self.scanned))


def group_rows(x_BTD: jax.Array, prompts: int) -> jax.Array:
    """Rows of one prompt side by side: [B, T, D] -> [P, (B/P)·T, D].

    Raises:
        ConfigError: when the rows do not divide among the prompts.
    """
    if x_BTD.shape[0] % prompts:
        raise ConfigError(f"{x_BTD.shape[0]} rows cannot be shared evenly by {prompts} prompts", field="x_BTD")
    return x_BTD.reshape(prompts, -1, x_BTD.shape[-1])


def require_single(prompts: int) -> None:
    """Merging writes one prompt's weights.

    Raises:
        ConfigError: when there are several.
    """
    if prompts != 1:
        raise ConfigError(
            f"weights can be merged for one prompt at a time, not for {prompts}",
            field="adapter",
            remedy="select one first",
        )
