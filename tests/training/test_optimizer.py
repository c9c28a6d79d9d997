"""The learning rate follows warm-up and cosine; weight decay spares vectors and embeddings; the update is AdamW's."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOUD, EDGE, SAME, SETTINGS, prompts_of

from lora_gen_jax.config import TrainConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.models import init_params
from lora_gen_jax.training.optimizer import decayed, make_optimizer, schedule

pytestmark = pytest.mark.float64


def expected_rate(n, peak, warmup, steps):
    """Update number n, from 1: linear to the peak, then a cosine that would reach zero one step after the last."""
    if n <= warmup:
        return peak * n / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (n - warmup) / (steps + 1 - warmup)))


@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (1, 2), (3, 10), (50, 1000)])
def test_the_rate_warms_up_linearly_and_decays_by_cosine(warmup, steps):
    rate = schedule(TrainConfig(steps=steps, learning_rate=0.5, warmup_steps=warmup))
    rates = [float(rate(jnp.asarray(n))) for n in range(steps)]
    expected = [expected_rate(n + 1, 0.5, warmup, steps) for n in range(steps)]
    np.testing.assert_allclose(rates, expected, **SAME)
    assert min(rates) > 0, "no update is wasted"


@pytest.mark.parametrize(("warmup", "steps", "fits"), [(10, 11, 10), (10, 10, 5), (10, 4, 2), (10, 1, 0), (0, 1, 0)])
def test_a_warmup_that_does_not_fit_is_half_of_the_run(warmup, steps, fits):
    config = TrainConfig(steps=steps, learning_rate=0.5, warmup_steps=warmup)
    assert config.warmup == fits
    rates = [float(schedule(config)(jnp.asarray(n))) for n in range(steps)]
    np.testing.assert_allclose(rates, [expected_rate(n + 1, 0.5, fits, steps) for n in range(steps)], **SAME)


@pytest.mark.parametrize("variant", [{}, {"pool": "per_layer"}, {"generator": "direct"}])
def test_weight_decay_applies_to_matrices_that_are_no_embeddings(variant):
    generator = LoRAGen(Decoder(CLOUD), EDGE, dataclasses.replace(SETTINGS, **variant))

    def init():
        frozen = jax.tree.map(jnp.zeros_like, init_params(Decoder(CLOUD)))
        return generator.init(jax.random.key(0), frozen, prompts_of([3], 1, 16))["params"]

    mask = jax.tree_util.tree_leaves_with_path(decayed(jax.eval_shape(init)))
    spared = {jax.tree_util.keystr(path, simple=True, separator="/") for path, on in mask if not on}
    common = {"cloud/meta_embedding"}
    if variant.get("generator") == "direct":
        names = ("hidden", *(f"{site}_{factor}" for site in EDGE.ffn_sites for factor in "ab"))
        assert spared == common | {f"direct/{name}/bias" for name in names}
    else:
        assert spared == common | {"router/norm/scale", "router/norm/bias"}


def test_updates_are_adamws():
    """Three updates of one matrix and one vector, by the published formulas in float64."""
    config = TrainConfig(steps=10, learning_rate=0.1, warmup_steps=2, beta1=0.8, beta2=0.9, weight_decay=0.3)
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((2, 3)), "b": rng.standard_normal(3)}
    ours = {k: jnp.asarray(v) for k, v in params.items()}
    optimizer = make_optimizer(config)
    state = optimizer.init(ours)
    first, second = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    for n in range(1, 4):
        gradients = {k: rng.standard_normal(v.shape) for k, v in params.items()}
        with jax.numpy_dtype_promotion("standard"):
            given = {k: jnp.asarray(g) for k, g in gradients.items()}
            updates, state = optimizer.update(given, state, ours)
        ours = {k: ours[k] + updates[k] for k in ours}
        for k, g in gradients.items():
            first[k] = 0.8 * first[k] + 0.2 * g
            second[k] = 0.9 * second[k] + 0.1 * g**2
            step = first[k] / (1 - 0.8**n) / (np.sqrt(second[k] / (1 - 0.9**n)) + 1e-8)
            decay = 0.3 * params[k] if k == "w" else 0.0
            params[k] = params[k] - expected_rate(n, 0.1, 2, 10) * (step + decay)
            np.testing.assert_allclose(ours[k], params[k], **SAME)


def test_gradients_are_clipped_to_the_global_norm_where_asked_for():
    """Adam forgets a constant factor, so only a later, larger gradient shows the clipping."""
    small, large = {"w": jnp.full((2, 2), 0.1)}, {"w": jnp.full((2, 2), 100.0)}

    def second_update(clip, gradient):
        optimizer = make_optimizer(TrainConfig(steps=10, warmup_steps=0, weight_decay=0.0, clip_norm=clip))
        params = {"w": jnp.zeros((2, 2))}
        state = optimizer.init(params)
        with jax.numpy_dtype_promotion("standard"):
            _, state = optimizer.update(small, state, params)
            return np.asarray(optimizer.update(gradient, state, params)[0]["w"])

    # A gradient of norm 200 clipped to 0.2 is the small one again, whose norm is 0.2.
    np.testing.assert_allclose(second_update(0.2, large), second_update(None, small), **SAME)
    assert abs(second_update(None, large)[0, 0] / second_update(None, small)[0, 0] - 1) > 0.1
