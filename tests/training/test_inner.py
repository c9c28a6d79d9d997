"""Training for refining: the steps on the shots, against a rendering without the package's router or decoder."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOUD, EDGE, generator_variables, random_params

from lora_gen_jax.config import Config, DataConfig, TrainConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.data.pipeline import Group, pack_groups
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.generator.router import Gates
from lora_gen_jax.generator.trained_module import Generated
from lora_gen_jax.training.inner import refined
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.step import edge_loss, init_state, make_train_step, objective

pytestmark = pytest.mark.float64
SAME = helpers.SAME["rtol"]
DATA = DataConfig(
    prompts_per_step=4,
    prompts_per_row=2,
    cloud_length=32,
    edge_length=24,
    response_slots=8,
    query_length=12,
    shot_length=16,
)
SETTINGS = dataclasses.replace(helpers.SETTINGS, cv_coefficient=0.3)
TRAIN = TrainConfig(steps=10, warmup_steps=1, inner_steps=2, inner_swapped=0.5)


def _groups():
    """Four prompts; the last one has no shots."""
    rng, groups = np.random.default_rng(0), []
    for shots in (2, 1, 2, 0):
        drawn = [tuple(rng.integers(2, 53, n).tolist() for n in (3, 2)) for _ in range(2 + shots)]
        prompt = rng.integers(2, 53, int(rng.integers(3, 10))).tolist()
        groups.append(Group("", (), prompt, drawn[:2], shot_queries=drawn[2:]))
    return groups


GROUPS = _groups()
BATCH = pack_groups(GROUPS, DATA, EDGE.num_layers)


@pytest.fixture(scope="module")
def setting():
    """(generator, frozen weights, variables with B away from zero)."""
    frozen = {"cloud": random_params(CLOUD, seed=2), "edge": random_params(EDGE, seed=3)}
    generator = LoRAGen(Decoder(CLOUD), EDGE, SETTINGS)
    return generator, frozen, generator_variables(generator, frozen["cloud"], BATCH.prompts)


def _shots():
    assert BATCH.shots is not None
    return BATCH.shots


def _shot_loss(frozen):
    return lambda adapter: edge_loss(Decoder(EDGE), frozen["edge"], adapter, _shots(), {})


def _read(setting):
    generator, frozen, variables = setting
    return generator.apply(variables, frozen["cloud"], BATCH.prompts)


def test_shots_are_laid_out_as_queries_are():
    alone = pack_groups(
        [Group("", (), g.prompt, g.shot_queries) for g in GROUPS], dataclasses.replace(DATA, edge_length=16), 2
    )
    for name in ("tokens_PT", "positions_PT", "segments_PT", "source_PS", "target_PS", "weight_PS"):
        assert np.array_equal(getattr(_shots(), name), getattr(alone, name))


def test_the_steps_are_those_of_the_equation(setting):
    """logits - rate · Σ g / (|g| + 0.2 rms(g)), g by finite differences of a soft mixture around the chosen gates."""
    _, frozen, _ = setting
    read = _read(setting)
    train = dataclasses.replace(TRAIN, inner_steps=1, inner_swapped=0.0)
    moved = refined(read, _shot_loss(frozen), SETTINGS, train, jax.random.key(0))
    logits = np.asarray(read.logits_PLE)
    found = (logits - np.asarray(moved.logits_PLE)) / train.inner_rate

    def soft(z):
        return np.exp(z) / np.sum(np.exp(z))

    def loss(gates_PLE):
        pool = read.adapter.with_gates(Gates.of_all(jnp.asarray(gates_PLE)).by_layer())
        return float(_shot_loss(frozen)(pool))

    gates, p, layer, h = np.asarray(read.gates.dense()), 1, 0, 1e-5
    expected = []
    for e in range(SETTINGS.num_experts):
        sides = []
        for sign in (h, -h):
            shifted = logits[p, layer].copy()
            shifted[e] += sign
            trial = gates.copy()
            trial[p, layer] += soft(shifted) - soft(logits[p, layer])
            sides.append(loss(trial))
        expected.append((sides[0] - sides[1]) / (2 * h))
    expected = np.array(expected)
    assert np.max(np.abs(expected)) > 1e-6
    expected = expected / (np.abs(expected) + 0.2 * np.sqrt(np.mean(expected**2)))
    # Central differences: an error of h²·f''' and of rounding, ε/h of the loss, beside a gradient of this size.
    np.testing.assert_allclose(found[p, layer], expected, atol=1e-3)


def test_steps_lower_the_loss_on_the_shots_and_spare_prompts_without(setting):
    _, frozen, _ = setting
    read = _read(setting)
    train = dataclasses.replace(TRAIN, inner_rate=0.1, inner_swapped=0.0)
    moved = refined(read, _shot_loss(frozen), SETTINGS, train, jax.random.key(0))
    assert _shot_loss(frozen)(moved.adapter) < _shot_loss(frozen)(read.adapter)
    assert np.array_equal(moved.gates.dense()[3], read.gates.dense()[3])
    assert not np.array_equal(moved.gates.dense()[0], read.gates.dense()[0])


def test_those_who_are_swapped_begin_with_the_next_prompts_logits(setting):
    _, frozen, _ = setting
    read = _read(setting)
    train = dataclasses.replace(TRAIN, inner_swapped=1.0)
    moved = refined(read, _shot_loss(frozen), SETTINGS, train, jax.random.key(0))
    np.testing.assert_allclose(
        moved.gates.dense()[3], read.gates.dense()[2], rtol=SAME, atol=SAME
    )  # the one without shots stays there
    away = refined(read, _shot_loss(frozen), SETTINGS, train, jax.random.key(0), active=False)
    np.testing.assert_allclose(away.gates.dense(), read.gates.dense(), rtol=SAME, atol=SAME)


def test_gates_with_noise_stay_as_they_are_before_inner_steps_begin(setting):
    _, frozen, _ = setting
    noisy = _read(setting)
    other = noisy.gates.replace(index=noisy.gates.index[:, :, ::-1])
    noisy = noisy.replace(gates=other)  # what its logits do not say
    away = refined(noisy, _shot_loss(frozen), SETTINGS, TRAIN, jax.random.key(0), active=False)
    assert np.array_equal(away.gates.dense(), noisy.gates.dense())
    assert np.array_equal(away.adapter.gates.dense(), noisy.gates.by_layer().dense())


def test_the_pool_learns_at_the_refined_gates_and_the_router_from_its_own_prompts(setting):
    """First order: the gradient is that of the loss at the moved logits, whose move counts as given."""
    generator, frozen, variables = setting
    config = Config(generator=SETTINGS, data=DATA, train=dataclasses.replace(TRAIN, inner_swapped=0.0))
    loss_fn = objective(generator, Decoder(EDGE), config)
    stats, key = variables["batch_stats"], jax.random.key(0)
    gradient = jax.grad(lambda p: loss_fn(p, stats, frozen, BATCH, key)[0])(variables["params"])

    def made(params):
        out, _ = generator.apply(
            {"params": params, "batch_stats": stats}, frozen["cloud"], BATCH.prompts, True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.split(key, 3)[0], "gumbel": key},
        )  # fmt: skip
        return out

    read = made(variables["params"])
    moved = refined(read, _shot_loss(frozen), SETTINGS, config.train, key)
    move_PLE = moved.logits_PLE - read.logits_PLE

    def at_the_moved_logits(params):
        out = made(params)
        soft = jax.nn.softmax(out.logits_PLE + move_PLE)
        weight, index = jax.lax.top_k(soft, SETTINGS.top_k)
        chosen = jnp.sum(jax.nn.one_hot(index, SETTINGS.num_experts), axis=-2)
        gates_PLE = soft * chosen / jnp.sum(weight, axis=-1, keepdims=True)
        gates = Gates.of_all(gates_PLE)
        auxiliary, _ = generator.auxiliary(Generated(None, gates), {}, BATCH)
        adapter = out.adapter.with_gates(gates.by_layer())
        return edge_loss(Decoder(EDGE), frozen["edge"], adapter, BATCH, {}) + auxiliary

    expected = jax.grad(at_the_moved_logits)(variables["params"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=SAME, atol=SAME), gradient, expected)
    assert np.max(np.abs(gradient["router"]["f1"])) > 1e-7


def test_inner_steps_begin_when_the_run_has_come_so_far(setting):
    generator, frozen, _ = setting
    plain = BATCH.replace(shots=None)
    optimizer = make_optimizer(TRAIN)
    losses = {}

    def noisy(x):
        return x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    for name, batch, train in (
        ("before", BATCH, dataclasses.replace(TRAIN, inner_after=1)),
        ("without", plain, dataclasses.replace(TRAIN, inner_steps=0)),
        ("within", BATCH, TRAIN),
    ):
        config = Config(generator=SETTINGS, data=DATA, train=train)
        state = init_state(generator, optimizer, frozen, batch, 0)
        # At first B is zero, and no gate changes anything.
        step = make_train_step(generator, Decoder(EDGE), optimizer, config)
        losses[name] = float(step(state.replace(params=jax.tree.map(noisy, state.params)), frozen, batch)[1]["loss"])
    assert losses["before"] == pytest.approx(losses["without"], rel=1e-12)
    assert losses["within"] != pytest.approx(losses["without"], rel=1e-6)


@pytest.mark.parametrize(
    ("field", "part", "changes"),
    [
        ("train.inner_steps", "train", {"inner_steps": -1}),
        ("train.inner_rate", "train", {"inner_rate": 0.0}),
        ("train.inner_swapped", "train", {"inner_swapped": 1.5}),
        ("train.inner_after", "train", {"inner_after": -1}),
        ("data.shot_length", "data", {"shot_length": 64}),
        ("data.shot_length", "train", {"inner_steps": 2}),
    ],
)
def test_settings_that_do_not_fit_are_named(field, part, changes):
    config = Config()
    with pytest.raises(ConfigError) as caught:
        check(dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)}))
    assert caught.value.field == field
