"""The language-model loss at the supervised positions alone.

In: hidden states [N, D], the frozen unembedding and targets. Out: the mean cross-entropy in nats. Logits exist
for one chunk of tokens at a time, in the forward pass only: the gradient with respect to the hidden states is
computed there as well, and the unembedding needs none.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp


def chunked_cross_entropy(
    logits_of: Callable[..., jax.Array], frozen: object, hidden_ND: jax.Array, targets_N: jax.Array, chunk: int
) -> jax.Array:
    """Cross-entropy [N] in nats, -log softmax(logits)[target], differentiable in `hidden_ND` alone.

    Args:
        logits_of: ``logits_of(frozen, hidden_XD) -> logits [X, V]``; static.
        frozen: its parameters; they receive a zero gradient.
        hidden_ND: hidden states.
        targets_N: token ids.
        chunk: tokens whose logits exist at the same time; N is padded to a multiple.
    """
    return _cross_entropy(logits_of, chunk, frozen, hidden_ND, targets_N)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(logits_of, chunk, frozen, hidden_ND, targets_N):
    return _chunks(lambda h, t: _loss(logits_of, frozen, h, t), chunk, hidden_ND, targets_N)


def _loss(logits_of, frozen, hidden_XD, targets_X):
    logits_XV = logits_of(frozen, hidden_XD).astype(jnp.float32)
    picked = jnp.take_along_axis(logits_XV, targets_X[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_XV, axis=-1) - picked


def _chunks(fn, chunk, hidden_ND, targets_N):
    N, D = hidden_ND.shape
    if N <= chunk:
        return fn(hidden_ND, targets_N)
    pad = -N % chunk
    hidden = jnp.pad(hidden_ND, ((0, pad), (0, 0))).reshape(-1, chunk, D)
    targets = jnp.pad(targets_N, (0, pad)).reshape(-1, chunk)
    out = jax.lax.map(lambda pair: fn(*pair), (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:N], out)


def _forward(logits_of, chunk, frozen, hidden_ND, targets_N):
    def both(h, t):
        loss, pull = jax.vjp(lambda x: _loss(logits_of, frozen, x, t), h)
        return loss, pull(jnp.ones_like(loss))[0]

    loss_N, gradient_ND = _chunks(both, chunk, hidden_ND, targets_N)
    return loss_N, (frozen, gradient_ND)


def _backward(logits_of, chunk, residuals, cotangent_N):
    frozen, gradient_ND = residuals
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    return zeros, gradient_ND * cotangent_N[:, None].astype(gradient_ND.dtype), None


_cross_entropy.defvjp(_forward, _backward)
