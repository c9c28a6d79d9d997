"""One matrix product with its gradient rule, for every large product of a training step.

In: activations x and weights w. Out: x·w in the type of x. `operands` is the type that both are rounded to before they
are multiplied; sums are kept in fp32 and are not rounded to it. A processor's matrix unit (AMX, AVX512-BF16) takes
bf16 operands and gives fp32: with `operands=bfloat16` the activations around a product stay in fp32. The products of
the backward pass round their operands alike.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

KEPT = "product"
"""The name of results that the backward pass keeps under remat "dots" alone: those of adapters."""


def product(x: jax.Array, w: jax.Array, operands: Any = None) -> jax.Array:
    """x [..., inputs] · w [inputs, outputs], or one w for each of the leading axes: x [..., n, inputs], w [..., i, o].

    The gradient of w is a sum in fp32, rounded once to the type of w; JAX alone would round it to the type of x first.
    The rule covers only reverse mode: `jax.jvp` and `jax.hessian` need plain products (`operands` of linear layers left
    out, adapters merged).

    Args:
        x: activations; the result is of their type.
        w: weights of any float type.
        operands: what both are rounded to; left out, the type of x.
    """
    return _product(jnp.dtype(x.dtype if operands is None else operands).name, x, w)


def product_beside(x: jax.Array, w: jax.Array, h: jax.Array, b: jax.Array, operands: Any) -> jax.Array:
    """x·w + h·b as one product of [x | h] and [w; b], in the type of x; arguments as of `product`, two axes for w, b.

    A low-rank path costs no pass over the outputs, nor over the gradient of x.
    """
    return _beside(jnp.dtype(operands).name, x, w, h, b)


def kept(y: jax.Array, name: str = KEPT) -> jax.Array:
    """Names a result that remat "dots" keeps for the backward pass; linear layers' have their site's name."""
    return checkpoint_name(y, name)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(operands: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(operands), w.astype(operands), preferred_element_type=x.dtype)


def _forward(operands: str, x: Any, w: Any) -> tuple[jax.Array, Any]:
    left, right = x.value.astype(operands), w.value.astype(operands)
    y = jnp.matmul(left, right, preferred_element_type=x.value.dtype)
    # Frozen weights need no gradient, and so no activations. An empty array remembers type and axes of w.
    stored = jnp.zeros((0,) * w.value.ndim, w.value.dtype)
    return y, (left if w.perturbed else None, right if x.perturbed else None, stored)


def _backward(operands: str, residuals: Any, gradient: Any) -> tuple[jax.Array | None, jax.Array | None]:
    if isinstance(gradient, SymbolicZero):
        return None, None
    left, right, stored = residuals
    of_x = of_w = None
    rounded = gradient.astype(operands)
    if right is not None:
        of_x = jnp.matmul(rounded, right.swapaxes(-1, -2), preferred_element_type=gradient.dtype)
    if left is not None:
        if stored.ndim == 2:
            left, rounded = left.reshape(-1, left.shape[-1]), rounded.reshape(-1, rounded.shape[-1])
        of_w = _of_weight(left, rounded, stored.dtype)
    return of_x, of_w


def _of_weight(left: jax.Array, gradient: jax.Array, dtype: Any) -> jax.Array:
    """leftᵀ·gradient with the smaller of both laid out anew.

    A CPU's fast products sum over the last axis of their left operand; left to itself, XLA folds the transposition into
    the product, and takes one of another layout, which is up to five times as slow.
    """
    if gradient.shape[-1] < left.shape[-1]:
        turned = jax.lax.optimization_barrier(gradient.swapaxes(-1, -2))
        return jnp.matmul(turned, left, preferred_element_type=dtype).swapaxes(-1, -2)
    turned = jax.lax.optimization_barrier(left.swapaxes(-1, -2))
    return jnp.matmul(turned, gradient, preferred_element_type=dtype)


_product.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _beside(operands: str, x: jax.Array, w: jax.Array, h: jax.Array, b: jax.Array) -> jax.Array:
    left, right = jnp.concatenate([x, h], -1).astype(operands), _stacked(operands, w, b)
    return jnp.matmul(left, right, preferred_element_type=x.dtype)


def _stacked(operands: str, w: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([w.astype(operands), b.astype(operands)], 0)


def _beside_forward(operands: str, x: Any, w: Any, h: Any, b: Any) -> tuple[jax.Array, Any]:
    right, low = _stacked(operands, w.value, b.value), h.value.astype(operands)
    left = jnp.concatenate([x.value.astype(operands), low], -1)
    y = jnp.matmul(left, right, preferred_element_type=x.value.dtype)
    # Only h where w is frozen. Empty arrays remember types and sizes.
    stored = tuple(jnp.zeros((0, len(v.value)), v.value.dtype) for v in (w, b))
    return y, (left if w.perturbed else low, right, stored)


def _beside_backward(operands: str, residuals: Any, gradient: Any) -> tuple[jax.Array | None, ...]:
    if isinstance(gradient, SymbolicZero):
        return None, None, None, None
    left, right, (w, b) = residuals
    inputs, rounded = w.shape[1], gradient.astype(operands)
    of_both = jnp.matmul(rounded, right.T, preferred_element_type=gradient.dtype)
    # Of [w; b], or of b only.
    rows = left.reshape(-1, left.shape[-1]), rounded.reshape(-1, rounded.shape[-1])
    of_weights = _of_weight(*rows, gradient.dtype)
    of_b = of_weights[-b.shape[1] :].astype(b.dtype)
    of_w = of_weights[:inputs].astype(w.dtype) if len(of_weights) > b.shape[1] else None
    return of_both[..., :inputs], of_w, of_both[..., inputs:], of_b


_beside.defvjp(_beside_forward, _beside_backward, symbolic_zeros=True)
