"""Draws against a plain NumPy reading of temperature, top-k and top-p."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import raises

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.inference.sampling import Sampling, rank_and_filter, row_keys, sample

LOGITS_BV = np.random.default_rng(0).normal(size=(3, 23)).astype(np.float32) * 2


@jax.jit
def run(logits_BV, settings, key):
    return sample(logits_BV, settings, row_keys(key, 0, len(logits_BV)))


def expected_probabilities(logits_V, temperature, top_k, top_p):
    """Temperature, then the k likeliest, then the fewest likeliest whose renormalized probabilities reach p."""
    scaled = logits_V.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if top_k:
        order = order[:top_k]
    p = {i: p[i] / sum(p[j] for j in order) for i in order}
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += p[i]
        if total >= top_p:
            break
    result = np.zeros(len(logits_V))
    for i in kept:
        result[i] = p[i] / total
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 5, 1.0), (0.7, 0, 0.8), (1.3, 7, 0.6), (1.0, 1, 1.0), (1.0, 0, 1e-6), (2.0, 100, 1.0), (1.0, 0, 1.0)],
)
def test_filters_match_numpy(temperature, top_k, top_p):
    settings = Sampling(temperature, top_k, top_p).checked()
    order_BV, ranked_BV = rank_and_filter(jnp.asarray(LOGITS_BV) / settings.temperature, settings)
    got_BV = np.zeros(LOGITS_BV.shape)
    np.put_along_axis(got_BV, np.asarray(order_BV), np.asarray(jax.nn.softmax(ranked_BV, axis=-1)), axis=1)
    # float32 rounds a scaled logit, its distance from the largest, both exponentials (by 2 units each) and a sum of V.
    largest = 2 * np.abs(LOGITS_BV).max() / temperature
    rtol = (2 * largest + 2 * 2 + LOGITS_BV.shape[1]) * 2.0**-24
    for got, logits in zip(got_BV, LOGITS_BV, strict=True):
        np.testing.assert_allclose(got, expected_probabilities(logits, temperature, top_k, top_p), rtol=rtol)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.8, 6, 1.0), (1.5, 0, 0.7)])
def test_frequencies_match_numpy(temperature, top_k, top_p):
    draws = 20_000
    logits_BV = np.broadcast_to(LOGITS_BV[0], (draws, LOGITS_BV.shape[1]))
    ids = np.asarray(run(logits_BV, Sampling(temperature, top_k, top_p).checked(), jax.random.key(1)))
    expected = expected_probabilities(LOGITS_BV[0], temperature, top_k, top_p)
    frequency = np.bincount(ids, minlength=len(expected)) / draws
    assert frequency[expected == 0].sum() == 0
    # Five standard deviations of a frequency.
    assert (np.abs(frequency - expected) < 5 * np.sqrt(expected / draws) + 1e-9).all()


def test_greedy_is_argmax():
    for settings in (Sampling(), Sampling(0.0, 3, 0.5), Sampling(0.7, 1), Sampling(1.0, 0, 1e-9), Sampling(1.5e-38)):
        ids = run(LOGITS_BV, settings.checked(), jax.random.key(0))
        np.testing.assert_array_equal(ids, LOGITS_BV.argmax(1))
        assert ids.dtype == jnp.int32


def test_ties_keep_exactly_k():
    settings = Sampling(1.0, 2).checked()
    order_BV, ranked_BV = rank_and_filter(jnp.zeros((1, 5)), settings)
    np.testing.assert_array_equal(order_BV[0, :2], [0, 1])
    np.testing.assert_array_equal(np.isfinite(ranked_BV[0]), [True, True, False, False, False])


def test_a_row_draws_alike_whatever_the_others_are():
    key, settings = jax.random.key(3), Sampling(1.0).checked()
    alone = [int(run(LOGITS_BV[:1], settings, jax.random.fold_in(key, i))[0]) for i in range(20)]
    batch = [int(run(LOGITS_BV, settings, jax.random.fold_in(key, i))[0]) for i in range(20)]
    assert alone == batch
    assert len(set(alone)) > 1


def test_other_settings_run_the_same_program():
    jitted, key_B = jax.jit(sample), row_keys(jax.random.key(0), 0, len(LOGITS_BV))
    for settings in (Sampling(), Sampling(1, 3), Sampling(0.5, 0, 0.9), Sampling(2.0, 5, 1)):
        jitted(LOGITS_BV, settings.checked(), key_B)
    assert jitted._cache_size() == 1


def test_every_row_follows_its_own_settings():
    each = [Sampling(), Sampling(1.0), Sampling(0.7, 4), Sampling(1.5, 0, 0.6)]
    logits_BV = np.broadcast_to(LOGITS_BV[0], (4, LOGITS_BV.shape[1]))
    together = Sampling(*(jnp.stack(x) for x in zip(*(jax.tree.leaves(one.checked()) for one in each), strict=True)))
    seen = set()
    for step in range(20):
        key_B = row_keys(jax.random.key(5), step, 4)
        mixed = jax.jit(sample)(logits_BV, together, key_B)
        alone = [int(jax.jit(sample)(logits_BV, one.checked(), key_B)[row]) for row, one in enumerate(each)]
        assert mixed.tolist() == alone
        seen.update(alone[1:])
    assert len(seen) > 2


def test_greedy_neither_sorts_nor_draws():
    text = run.lower(LOGITS_BV, Sampling().checked(), jax.random.key(0)).compile().as_text()
    # Sorting is in a branch of its own, which greedy decoding does not take.
    entry = text[text.index("ENTRY") :]
    assert "conditional(" in entry
    assert " sort(" not in entry


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (Sampling(-0.1), "temperature"),
        (Sampling(float("nan")), "temperature"),
        (Sampling(float("inf")), "temperature"),
        (Sampling(1.0, -1), "top_k"),
        (Sampling(1.0, 2.5), "top_k"),
        (Sampling(1.0, 0, 0.0), "top_p"),
        (Sampling(1.0, 0, 1.5), "top_p"),
        (Sampling(1.0, 0, float("nan")), "top_p"),
    ],
)
def test_bad_settings_are_named(settings, field):
    with raises(ConfigError, field, field):
        settings.checked()
