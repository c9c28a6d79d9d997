"""The parts of a decoder layer that hold parameters: linear layers with an adapter hook, norms, rotary angles.

In: activations [..., D]. Out: activations. Parameters may be stored in any float type; `dtype` is the type
that is computed in, norms and angles always in fp32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_gen_jax.adapters.protocol import SITES, Adapter
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.product import KEPT, kept, product, product_beside
from lora_gen_jax.decoder.quantized import FORMATS, format_of, quantized_product
from lora_gen_jax.sharding import constrain, partitioned

RECORDS = "records"
"""The collection of what adapters record, and of the pooled states that a caller asked for."""

POOLED = "pooled"
"""The name of pooled states among the records."""

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Linear(nn.Module):
    """x·W (+ b) (+ what an adapter adds for the site that this module is named after).

    W is of any float type, or quantized. It computes in `dtype`, with operands rounded to `operands` where that is
    given (`product`); the result is of `out_dtype`, where that is given, without having been rounded to `dtype`.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = False
    dtype: jax.typing.DTypeLike = float
    out_dtype: jax.typing.DTypeLike | None = None
    operands: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, adapter: Adapter | None = None) -> jax.Array:
        """[B, T, inputs] -> [B, T, features]."""
        init = partitioned(nn.initializers.lecun_normal(), *self.axes)
        kernel = self.param("kernel", init, (x_BTD.shape[-1], self.features))
        if kernel.dtype == jnp.uint16:  # bf16, which the scan over layers sliced as bits
            kernel = jax.lax.bitcast_convert_type(kernel, jnp.bfloat16)
        quantized = format_of(kernel)
        if quantized is None:
            kernel = kernel.astype(self.dtype if self.operands is None else self.operands)
        # Stored in pieces, gathered here: the alternative, partial sums of all rows, moves far more.
        whole = tuple(None if axis == "embed" else axis for axis in self.axes)
        kernel = constrain(kernel, *whole)
        key = None if adapter is None else dropout_key(self)
        low = None
        # Where outputs are fewer, laying both operands out side by side costs more than another pass over the outputs.
        beside = self.operands is not None and quantized is None and self.features > x_BTD.shape[-1]
        if adapter is not None and beside:
            low = adapter.lowered(str(self.name), x_BTD, key)
        if quantized is not None:
            blocks = x_BTD.shape[-1] // FORMATS[quantized].block_of(x_BTD.shape[-1])
            scales = self.param("scales", nn.initializers.ones_init(), (blocks, self.features))
            y = quantized_product(x_BTD, kernel, constrain(scales, *whole), self.operands)
        elif self.operands is None:
            y = jnp.matmul(x_BTD, kernel, preferred_element_type=self.out_dtype)
        elif low is not None:
            y = product_beside(x_BTD, kernel, *low, self.operands)
        else:
            y = product(x_BTD, kernel, self.operands)
        if self.use_bias:
            init = partitioned(nn.initializers.zeros_init(), self.axes[1])
            bias = self.param("bias", init, (self.features,))
            y = y + bias.astype(y.dtype)[None, None]
        if adapter is not None and self.name is not None:
            delta = adapter.delta(self.name, x_BTD, key) if low is None else None
            y = y if delta is None else y + delta.astype(y.dtype)
            record(self, adapter, self.name, x_BTD)
        return kept(y, self.name if self.name in SITES else KEPT)


def dropout_key(module: nn.Module) -> jax.Array | None:
    """A fresh key where dropout is on, that is, where the rng "dropout" was passed."""
    return module.make_rng("dropout") if module.has_rng("dropout") else None


def record(module: nn.Module, adapter: Adapter, site: str, x_BTD: jax.Array) -> None:
    """Keeps what an adapter records at a site in the collection `RECORDS`, where the caller asked for it."""
    if module.is_mutable_collection(RECORDS) and not module.is_initializing():
        said = adapter.record(site, x_BTD)
        if said is not None:
            module.sow(RECORDS, site, said)


def records_of(collections: Any) -> dict[str, jax.Array]:
    """{site: [L, B, T, X]} from the collections that a decoder's `apply` gave back."""
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(collections.get(RECORDS, {})):
        # … / site / 0: `sow` gathers what one place says in a tuple.
        found[path[-2].key] = value
    return found


class Norm(nn.Module):
    """RMS norm with scale (offset + w), or LayerNorm with a bias, computed in fp32."""

    config: DecoderConfig
    dtype: jax.typing.DTypeLike = float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        x = x_BTD.astype(float)
        # Random initial weights of families with an offset start at scale 1, as the others do.
        init = partitioned(nn.initializers.constant(1.0 - c.norm_offset), "norm")
        scale = self.param("scale", init, (x.shape[-1],))
        if c.norm == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + c.norm_eps)
        x = x * (c.norm_offset + scale.astype(float))[None, None]
        if c.norm == "layer":
            init = partitioned(nn.initializers.zeros_init(), "norm")
            bias = self.param("bias", init, (x.shape[-1],))
            x = x + bias.astype(float)[None, None]
        return x.astype(self.dtype)


def rotary_angles(config: DecoderConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, each [B, T, 1, H/2] in fp32.

    The frequencies of Llama 3 (`rope_type: llama3`) are divided by `factor` where the wavelength exceeds
    original_max_positions / low_frequency_factor, kept below original_max_positions / high_frequency_factor,
    and interpolated in between.
    """
    assert config.rope_theta is not None
    exponent = jnp.arange(0, config.head_dim, 2, dtype=float) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    if (s := config.rope_scaling) is not None:
        turns = s.original_max_positions * frequency / (2 * jnp.pi)
        smooth = (turns - s.low_frequency_factor) / (s.high_frequency_factor - s.low_frequency_factor)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        frequency = frequency * (smooth + (1 - smooth) / s.factor)
    angles = positions_BT.astype(float)[..., None, None] * frequency[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head, in fp32."""
    cos, sin = cos_sin
    first, second = jnp.split(x_BTNH.astype(float), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
