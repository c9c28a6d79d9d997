"""Frozen weights in 8 or 4 bits: codes and scales in the place of a linear layer's kernel.

In: a kernel [..., inputs, outputs]. Out: codes of the same shape, and scales [..., blocks, outputs], one for an
output and a block of inputs: w ≈ value(code)·scale. Both lie side by side in the parameter tree, "kernel" and "scales".

``int8``: integers from -127 to 127, one block. |w - ŵ| is at most scale / 2. A scale multiplies what its output sums
to, so the product takes the integers themselves, which bf16 holds exactly.

``nf4``: NormalFloat of QLoRA (https://arxiv.org/abs/2305.14314, appendix E), blocks of 64. |w - ŵ| is at most
`NF4_ERROR`·scale. Weights are made float again where they are multiplied, and again in the backward pass.

Weights get no gradient: they are frozen. Gradients flow to the inputs.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_ERROR = max(b - a for a, b in itertools.pairwise(NF4)) / 2
"""Half of the widest gap between values; a scale rounded to bf16 leaves the largest weight nearer to ±1 than that."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How codes and scales are stored.

    Attributes:
        codes: their type.
        scales: theirs.
        largest: the largest value of a code.
        block: most inputs that share a scale; None for all.
    """

    codes: Any
    scales: Any
    largest: float
    block: int | None = None

    def block_of(self, inputs: int) -> int:
        """Inputs that share a scale: as many as divide the inputs."""
        return inputs if self.block is None else math.gcd(self.block, inputs)


FORMATS = {
    "int8": Format(jnp.int8, jnp.float32, 127.0),
    "nf4": Format(jnp.uint4, jnp.bfloat16, 1.0, 64),
}


def format_of(kernel: Any) -> str | None:
    """The name of the format that a kernel's type says; None for a float kernel."""
    return next((name for name, format in FORMATS.items() if kernel.dtype == format.codes), None)


def scales_of(w: Any, format: Format, xp: Any = jnp) -> Any:
    """The scales [..., blocks, outputs] of weights [..., inputs, outputs] in fp32; `xp` is jnp or np."""
    block = format.block_of(w.shape[-2])
    blocks = w.reshape(*w.shape[:-2], w.shape[-2] // block, block, w.shape[-1])
    # A product, not a quotient by a constant, of which XLA makes one: NumPy and XLA then agree to the bit.
    scales = (xp.max(xp.abs(blocks), axis=-2) * xp.asarray(1 / format.largest, w.dtype)).astype(format.scales)
    # Of zeros: any scale will do but zero.
    return xp.where(scales > 0, scales, xp.ones_like(scales))


def codes_of(w: Any, scales: Any, format: Format, xp: Any = jnp) -> Any:
    """The nearest codes of weights in fp32, with a scale for every weight (or one that broadcasts)."""
    ratio = w / scales.astype(w.dtype)
    if format.codes == jnp.int8:
        return xp.clip(xp.rint(ratio), -format.largest, format.largest).astype(jnp.int8)
    between = np.asarray([(a + b) / 2 for a, b in itertools.pairwise(NF4)], w.dtype)
    return xp.searchsorted(xp.asarray(between), ratio).astype(jnp.uint8).astype(format.codes)


def expanded(scales: Any, inputs: int) -> Any:
    """[..., blocks, outputs] to one for every weight, [..., inputs, outputs]."""
    return jnp.repeat(scales, inputs // scales.shape[-2], axis=-2)


def quantize(w: jax.Array, name: str) -> dict[str, jax.Array]:
    """{"kernel": codes, "scales": scales} of weights [..., inputs, outputs]."""
    w, format = w.astype(jnp.float32), FORMATS[name]
    scales = scales_of(w, format)
    return {"kernel": codes_of(w, expanded(scales, w.shape[-2]), format), "scales": scales}


def dequantize(codes: jax.Array, scales: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """The weights that codes and scales stand for, computed in fp32 and rounded to `dtype` once."""
    w = _values(codes) * expanded(scales.astype(jnp.float32), codes.shape[-2])
    return w.astype(dtype)


def quantize_layers(params: Any, name: str) -> Any:
    """A decoder's parameters with the linear layers of all its layers quantized; embeddings, norms, biases stay.

    Boxed parameters stay boxed: scales have the axes of their kernel.
    """

    def walk(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        rest = {key: walk(value) for key, value in node.items() if key != "kernel"}
        if "kernel" not in node:
            return rest
        kernel = node["kernel"]
        if not hasattr(kernel, "replace_boxed"):
            return rest | quantize(kernel, name)
        return rest | {key: kernel.replace_boxed(value) for key, value in quantize(kernel.value, name).items()}

    return {**params, "layers": walk(params["layers"])}


def quantized_name(params: Any) -> str | None:
    """The format of a decoder's parameters; None where they are floats."""
    names = (format_of(x) for x in jax.tree.leaves(params["layers"]))
    return next((name for name in names if name is not None), None)


def quantized_product(x: jax.Array, codes: jax.Array, scales: jax.Array, operands: Any = None) -> jax.Array:
    """x [..., inputs] · w [inputs, outputs] in the type of x, with sums in fp32; reverse mode gives the gradient of x.

    Args:
        x: activations.
        codes, scales: of w.
        operands: what both are rounded to before they are multiplied; left out, the type of x.
    """
    return _product(jnp.dtype(x.dtype if operands is None else operands).name, x, codes, scales)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(operands: str, x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    sums = jnp.promote_types(x.dtype, jnp.float32)
    if codes.dtype == jnp.int8:
        y = jnp.matmul(x.astype(operands), codes.astype(operands), preferred_element_type=sums)
        y = y * scales.astype(sums).reshape((1,) * (x.ndim - 1) + (-1,))
    else:
        y = jnp.matmul(x.astype(operands), dequantize(codes, scales, operands), preferred_element_type=sums)
    return y.astype(x.dtype)


def _forward(operands: str, x: Any, codes: Any, scales: Any) -> tuple[jax.Array, Any]:
    # Codes and scales are kept and not the weights: those would be a copy of the model in the type of x.
    return _product(operands, x.value, codes.value, scales.value), (codes.value, scales.value)


def _backward(operands: str, residuals: Any, gradient: Any) -> tuple[jax.Array | None, None, None]:
    if isinstance(gradient, SymbolicZero):
        return None, None, None
    codes, scales = residuals
    sums = jnp.promote_types(gradient.dtype, jnp.float32)
    if codes.dtype == jnp.int8:
        scaled = gradient.astype(sums) * scales.astype(sums).reshape((1,) * (gradient.ndim - 1) + (-1,))
        of_x = jnp.matmul(scaled.astype(operands), codes.T.astype(operands), preferred_element_type=sums)
    else:
        w = dequantize(codes, scales, operands)
        of_x = jnp.matmul(gradient.astype(operands), w.T, preferred_element_type=sums)
    return of_x.astype(gradient.dtype), None, None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _values(codes: jax.Array) -> jax.Array:
    """What codes stand for, in fp32."""
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.float32)
    # A choice by each bit: a look-up in a table is slow on a TPU.
    bits, values = codes.astype(jnp.uint8), [jnp.float32(value) for value in NF4]
    for place in range(4):
        high = (bits >> place) & 1 == 1
        values = [jnp.where(high, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]
