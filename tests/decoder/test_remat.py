"""What is kept for the backward pass: the gradient is the same with every choice, and a choice keeps to its budget."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EDGE, SAME, raises, random_params, token_rows

from lora_gen_jax.adapters.lora import LoRA
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.remat import NAMES, Result, choose, results_of
from lora_gen_jax.errors import ConfigError

pytestmark = pytest.mark.float64


def loss(decoder, params, factors):
    tokens = np.asarray(token_rows([9, 9], EDGE.vocab_size), np.int32)
    adapter = LoRA(factors, scale=2.0, dropout_rate=0.25)
    hidden, _ = decoder.apply({"params": params}, tokens, adapter=adapter, rngs={"dropout": jax.random.key(0)})
    return jnp.mean(jnp.square(decoder.apply({"params": params}, hidden, method="logits")))


@pytest.fixture(scope="module")
def gradient():
    params, rng, factors = random_params(EDGE), np.random.default_rng(5), {}
    for site in ("q", "v", "up", "down"):
        inputs, outputs = EDGE.site_shape(site)
        shapes = {"a": (EDGE.num_layers, inputs, 2), "b": (EDGE.num_layers, 2, outputs)}
        factors[site] = {k: jnp.asarray(0.3 * rng.standard_normal(s)) for k, s in shapes.items()}
    return lambda remat: jax.jit(jax.grad(partial(loss, Decoder(EDGE, remat=remat), params)))(factors)


@pytest.fixture(scope="module")
def expected(gradient):
    return gradient("none")


@pytest.mark.parametrize("remat", ["fit", (), *((name,) for name in NAMES), ("q", "k", "v", "attention"), NAMES])
def test_every_choice_gives_the_same_gradient(gradient, expected, remat):
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(gradient(remat)), strict=True):
        assert np.max(np.abs(one)) > 1e-3
        np.testing.assert_allclose(one, other, **SAME)


def test_an_unknown_name_is_refused():
    with raises(ConfigError, "remat", "'embed'"):
        Decoder(EDGE, remat=("q", "embed")).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def test_what_can_be_kept_of_a_model():
    """Bytes and multiply-adds of 10 tokens in bf16, by hand; `down` only where a norm reads its result again."""
    found = {r.name: r[2:] for r in results_of("edge", EDGE, 10, 2, 256)}
    each, width = 10 * EDGE.num_layers, EDGE.num_heads * EDGE.head_dim
    assert list(found) == ["q", "k", "v", "o", *(site for site in EDGE.ffn_sites if site != "down"), "attention"]
    assert found["up"] == (each * EDGE.ffn_width * 2, each * EDGE.width * EDGE.ffn_width)
    assert found["attention"] == (each * (2 * width + 4 * EDGE.num_heads), each * width * 256)
    normed = results_of("edge", dataclasses.replace(EDGE, post_norms=True), 10, 2)
    assert {r.name for r in normed} == {"q", "k", "v", "o", *EDGE.ffn_sites}


def test_the_choice_is_the_best_that_the_budget_holds():
    rng = np.random.default_rng(0)
    results = [Result("edge", name, *map(int, rng.integers(1, 50, 2))) for name in NAMES]
    subsets = [s for n in range(len(NAMES) + 1) for s in itertools.combinations(results, n)]
    whole = sum(r.bytes for r in results)
    for budget in (-1, 0, 10, 60, 100, whole - 1, whole):
        kept = choose(results, budget)
        assert sum(r.bytes for r in kept) <= max(budget, 0)
        best = max(sum(r.macs for r in s) for s in subsets if sum(r.bytes for r in s) <= max(budget, 0))
        assert sum(r.macs for r in kept) == best
    assert choose(results, whole) == results
    assert choose([], 10) == []
