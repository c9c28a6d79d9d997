"""The chunked cross-entropy is the plain one, in value and gradient, whatever the chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SAME

from lora_gen_jax.training.losses import chunked_cross_entropy

pytestmark = pytest.mark.float64
P, S, D, V = 3, 11, 6, 17
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((D, V))
HIDDEN = 2 * RNG.standard_normal((P, S, D))
TARGETS = RNG.integers(0, V, (P, S), np.int32)
WEIGHTS = RNG.random((P, S))
WEIGHTS[1, 3] = 0.0


def logits_of(table, hidden):
    return 5.0 * jnp.tanh(hidden @ table / 5.0)


def plain(hidden):
    log_probabilities = jax.nn.log_softmax(logits_of(TABLE, hidden))
    return jnp.stack([jnp.stack([-log_probabilities[p, s, TARGETS[p, s]] for s in range(S)]) for p in range(P)])


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 12, 1000])
def test_value_and_gradient_are_those_of_plain_cross_entropy(chunk):
    """Chunks smaller than S (dividing it or not), equal to it, and larger."""

    def chunked(hidden):
        return chunked_cross_entropy(logits_of, TABLE, hidden, TARGETS, chunk)

    np.testing.assert_allclose(jax.jit(chunked)(HIDDEN), plain(HIDDEN), **SAME)
    ours = jax.jit(jax.grad(lambda h: jnp.sum(chunked(h) * WEIGHTS)))(HIDDEN)
    theirs = jax.grad(lambda h: jnp.sum(plain(h) * WEIGHTS))(HIDDEN)
    np.testing.assert_allclose(ours, theirs, **SAME)
    assert not np.any(ours[1, 3])


def test_the_frozen_unembedding_gets_no_gradient():
    gradient = jax.grad(lambda t: jnp.sum(chunked_cross_entropy(logits_of, t, HIDDEN, TARGETS, 4)))(TABLE)
    assert not np.any(gradient)


def test_logits_of_more_than_a_chunk_never_exist():
    """Neither forward nor backward: the largest array of the jaxpr with a vocabulary axis has `chunk` slots."""

    def total(hidden):
        return jnp.sum(chunked_cross_entropy(logits_of, TABLE, hidden, TARGETS, 4))

    text = str(jax.make_jaxpr(jax.value_and_grad(total))(HIDDEN))
    assert f"[{P},4,{V}]" in text
    assert f"[{P},{S},{V}]" not in text
    assert f"[{P},12,{V}]" not in text


def test_hidden_states_in_bf16_get_gradients_in_bf16():
    def total(hidden):
        table = TABLE.astype(np.float32)
        return jnp.sum(chunked_cross_entropy(lambda t, h: h.astype(jnp.float32) @ t, table, hidden, TARGETS, 4))

    with jax.enable_x64(False):
        loss, gradient = jax.value_and_grad(total)(jnp.asarray(HIDDEN, jnp.bfloat16))
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
