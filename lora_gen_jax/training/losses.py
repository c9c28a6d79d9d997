"""The language-model loss at the supervised positions only.

In: hidden states [P, S, D] at S slots of each of P rows, the frozen unembedding and targets. Out: the cross-entropy of
each slot in nats. Logits exist for some slots of every row at a time, in the forward pass only: the gradient with
respect to the hidden states is computed there as well, and the unembedding needs none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.sharding import mesh_size

# Logits that exist at the same time on a device: 2^26 numbers are 256 MB in fp32.
LOGITS_AT_ONCE = 2**26


def mean_cross_entropy(
    decoder: Decoder, frozen: Any, hidden_PSD: jax.Array, targets_PS: jax.Array, weight_PS: jax.Array
) -> jax.Array:
    """Mean cross-entropy in nats over the slots, by weight; 0 where no slot has any.

    Args:
        decoder, frozen: whose unembedding it is.
        hidden_PSD: its final hidden states.
        targets_PS: token ids.
        weight_PS: 1 for a supervised slot, 0 for others.
    """
    loss_PS = slot_cross_entropy(decoder, frozen, hidden_PSD, targets_PS)
    return jnp.sum(loss_PS * weight_PS) / jnp.maximum(jnp.sum(weight_PS), 1.0)


def slot_cross_entropy(decoder: Decoder, frozen: Any, hidden_PSD: jax.Array, targets_PS: jax.Array) -> jax.Array:
    """Cross-entropy [P, S] in nats of every slot; arguments as of `mean_cross_entropy`."""

    def logits_of(frozen: Any, hidden_PXD: jax.Array) -> Any:
        return decoder.apply({"params": frozen}, hidden_PXD, method="logits")

    rows = -(-hidden_PSD.shape[0] // mesh_size("batch"))
    chunk = max(1, LOGITS_AT_ONCE // (rows * decoder.config.vocab_size // mesh_size("vocab")))
    return chunked_cross_entropy(logits_of, frozen, hidden_PSD, targets_PS, chunk)


def chunked_cross_entropy(
    logits_of: Callable[..., jax.Array], frozen: object, hidden_PSD: jax.Array, targets_PS: jax.Array, chunk: int
) -> jax.Array:
    """Cross-entropy [P, S] in nats, -log softmax(logits)[target], differentiable only in `hidden_PSD`.

    Args:
        logits_of: ``logits_of(frozen, hidden_PXD) -> logits [P, X, V]``; static.
        frozen: its parameters; they receive a zero gradient.
        hidden_PSD: hidden states; rows may be split over devices, so chunks are of slots and have all rows.
        targets_PS: token ids.
        chunk: slots of a row whose logits exist at the same time; S is padded to a multiple.
    """
    return _cross_entropy(logits_of, chunk, frozen, hidden_PSD, targets_PS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(logits_of, chunk, frozen, hidden_PSD, targets_PS):
    return _chunks(lambda h, t: _loss(logits_of, frozen, h, t), chunk, hidden_PSD, targets_PS)


def _loss(logits_of, frozen, hidden_PXD, targets_PX):
    logits_PXV = logits_of(frozen, hidden_PXD).astype(float)
    picked_PX = jnp.take_along_axis(logits_PXV, targets_PX[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_PXV, axis=-1) - picked_PX


def _chunks(fn, chunk, hidden_PSD, targets_PS):
    P, S, D = hidden_PSD.shape
    if S <= chunk:
        return fn(hidden_PSD, targets_PS)
    pad = -S % chunk
    hidden = jnp.pad(hidden_PSD, ((0, 0), (0, pad), (0, 0))).reshape(P, -1, chunk, D).swapaxes(0, 1)
    targets = jnp.pad(targets_PS, ((0, 0), (0, pad))).reshape(P, -1, chunk).swapaxes(0, 1)
    out = jax.lax.map(lambda pair: fn(*pair), (hidden, targets))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(P, -1, *x.shape[3:])[:, :S], out)


def _forward(logits_of, chunk, frozen, hidden_PSD, targets_PS):
    def both(h, t):
        loss, pull = jax.vjp(lambda x: _loss(logits_of, frozen, x, t), h)
        return loss, pull(jnp.ones_like(loss))[0]

    loss_PS, gradient_PSD = _chunks(both, chunk, hidden_PSD, targets_PS)
    return loss_PS, (frozen, gradient_PSD)


def _backward(logits_of, chunk, residuals, cotangent_PS):
    frozen, gradient_PSD = residuals
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    return zeros, gradient_PSD * cotangent_PS[..., None].astype(gradient_PSD.dtype), None


_cross_entropy.defvjp(_forward, _backward)
