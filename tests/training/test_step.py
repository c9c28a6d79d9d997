"""One training step: which gradients flow, that they are right, and that grouping changes nothing but the cost."""

import dataclasses
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOUD, EDGE, SAME, generator_variables, logits, noise_like, random_params

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import Config, DataConfig, TrainConfig
from lora_gen_jax.data.pipeline import Group, pack_groups
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.generator.router import cv_squared
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.step import (
    TrainState,
    edge_loss,
    init_state,
    make_train_step,
    make_validation_step,
    objective,
)

pytestmark = pytest.mark.float64
DATA = DataConfig(
    prompts_per_step=4, prompts_per_row=2, cloud_length=32, edge_length=24, response_slots=8, query_length=12
)
# A weight that makes the balance loss count.
SETTINGS = dataclasses.replace(helpers.SETTINGS, cv_coefficient=0.3)
VARIANTS = {
    "shared": SETTINGS,
    "per_layer": dataclasses.replace(SETTINGS, pool="per_layer"),
    "direct": dataclasses.replace(SETTINGS, generator="direct"),
    "gumbel": dataclasses.replace(SETTINGS, routing="gumbel"),
}


def _groups():
    """Four prompts with one to three queries each; answers of one to three tokens."""
    rng, groups = np.random.default_rng(0), []
    for lengths in ([(3, 2), (5, 1)], [(4, 3)], [(2, 1), (6, 2), (3, 3)], [(7, 2), (1, 1)]):
        queries = [tuple(rng.integers(2, 53, n).tolist() for n in pair) for pair in lengths]
        groups.append(Group("", (), rng.integers(2, 53, int(rng.integers(3, 10))).tolist(), queries))
    return groups


GROUPS = _groups()
BATCH = pack_groups(GROUPS, DATA, EDGE.num_layers)


@pytest.fixture(scope="module")
def frozen():
    return {"cloud": random_params(CLOUD, seed=2), "edge": random_params(EDGE, seed=3)}


@pytest.fixture(scope="module")
def setting(frozen):
    """(generator, config, variables with B away from zero) of a variant; made once."""
    made = {}

    def get(name):
        if name not in made:
            config = Config(generator=VARIANTS[name], data=DATA, train=TrainConfig(steps=10, warmup_steps=1))
            generator = LoRAGen(Decoder(CLOUD), EDGE, config.generator)
            made[name] = generator, config, generator_variables(generator, frozen["cloud"], BATCH.prompts)
        return made[name]

    return get


@pytest.fixture(scope="module")
def gradient_fn(setting, frozen):
    """A variant's jitted ``params -> ((objective, (batch_stats, metrics)), gradients)``; compiled once."""
    made = {}

    def get(name):
        if name not in made:
            generator, config, variables = setting(name)
            loss_fn = objective(generator, Decoder(EDGE), config)
            rest = (variables.get("batch_stats", {}), frozen, BATCH, jax.random.key(0))
            made[name] = jax.jit(jax.value_and_grad(lambda params: loss_fn(params, *rest), has_aux=True))
        return made[name]

    return get


@pytest.mark.parametrize("name", list(VARIANTS))
def test_one_gradient_reaches_every_trainable_leaf(setting, gradient_fn, name):
    _, gradients = gradient_fn(name)(setting(name)[2]["params"])
    parts = {"cloud", "direct"} if name == "direct" else {"cloud", "router", "pool"}
    assert set(gradients) == parts
    if "router" in parts:
        assert set(gradients["router"]) == {"f1", "f2", "norm"}
        assert set(gradients["router"]["norm"]) == {"scale", "bias"}
        assert set(gradients["pool"]) == {f"{site}_{x}" for site in EDGE.ffn_sites for x in "ab"}
    assert set(gradients["cloud"]) == {"meta_embedding", "q_a", "q_b", "v_a", "v_b"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf)), path
        assert np.max(np.abs(leaf)) > 1e-7, path
    # Every meta token, every cloud layer, and every layer's own pool takes part.
    for leaf in (gradients["cloud"]["meta_embedding"], *(gradients["cloud"][k] for k in ("q_b", "v_b"))):
        assert np.all(np.max(np.abs(leaf), axis=tuple(range(1, leaf.ndim))) > 1e-8)


def test_only_the_trainable_tree_is_in_the_state(setting, frozen):
    generator, config, variables = setting("shared")
    state = jax.eval_shape(lambda f: init_state(generator, make_optimizer(config.train), f, BATCH, 0), frozen)
    assert jax.tree.structure(state.params) == jax.tree.structure(variables["params"])
    count = sum(x.size for x in jax.tree.leaves(state.params))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * count
    assert all(x.dtype == jnp.zeros((), float).dtype for x in jax.tree.leaves(state.params))


def test_with_b_at_zero_the_model_is_the_base_and_of_the_pool_only_b_learns(setting, gradient_fn, frozen):
    params = setting("shared")[2]["params"]
    zeroed = {k: jnp.zeros_like(x) if k.endswith("_b") else x for k, x in params["pool"].items()}
    (_, (_, metrics)), gradients = gradient_fn("shared")({**params, "pool": zeroed})
    base = jax.jit(lambda f: edge_loss(Decoder(EDGE), f, None, BATCH, {}))(frozen["edge"])
    np.testing.assert_allclose(metrics["loss"], base, **SAME)
    for name, leaf in gradients["pool"].items():
        assert bool(jnp.any(leaf != 0)) == name.endswith("_b"), name


def test_a_fresh_state_has_b_at_zero_and_no_statistics(frozen, setting):
    generator, config, _ = setting("shared")
    state = init_state(generator, make_optimizer(config.train), frozen, BATCH, seed=0)
    for name, leaf in {**state.params["pool"], **state.params["cloud"]}.items():
        assert bool(jnp.any(leaf != 0)) == (not name.endswith("_b")), name
    assert not any(np.any(x) for x in jax.tree.leaves(state.batch_stats))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_gradients_are_slopes(setting, gradient_fn, name):
    """Along a direction through each part, the gradient is the five-point difference of the objective, CV² included."""
    params, value_and_grad = setting(name)[2]["params"], gradient_fn(name)
    _, gradients = value_and_grad(params)
    h = 3e-5
    for part in params:
        # Half the gradient itself, half noise: a slope well above rounding, and no leaf left out.
        along, noise = (_unit(x[part]) for x in (gradients, noise_like(params, 100)))
        direction = jax.tree.map(lambda a, b: (a + b) / 2, along, noise)
        value = {
            step: float(
                value_and_grad({**params, part: jax.tree.map(partial(_moved, step * h), params[part], direction)})[0][0]
            )
            for step in (-2, -1, 1, 2)
        }
        slope = (8 * (value[1] - value[-1]) - (value[2] - value[-2])) / (12 * h)
        expected = _dot(gradients[part], direction)
        # A loss of order 4 is known to 1e-14, so the slope to 5e-10; fifth derivatives, below 1e9, add h⁴/30 of that.
        assert abs(slope - expected) < 5e-10 + 1e9 * h**4 / 30, (part, slope, expected)
        assert expected > 5e-3, part


def _moved(step, x, direction):
    return x + step * direction


def _dot(x, y):
    return sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def _unit(x):
    norm = _dot(x, x) ** 0.5
    return jax.tree.map(lambda leaf: leaf / norm, x)


def _losses_of_plain_passes(frozen, weights_of):
    """Cross-entropy of every answer token, each query read alone, in float64."""
    losses = []
    for p, group in enumerate(GROUPS):
        for query, response in group.queries:
            ids = np.zeros((1, 16), np.int32)
            ids[0, : len(query) + len(response)] = query + response
            row = np.asarray(logits(Decoder(EDGE), weights_of(p), ids), np.float64)[0]
            for i, target in enumerate(response):
                at = row[len(query) + i - 1]
                losses.append(np.log(np.sum(np.exp(at - at.max()))) + at.max() - at[target])
    return losses


@pytest.mark.parametrize("name", ["shared", "direct"])
def test_a_grouped_batchs_loss_is_the_mean_over_answer_tokens_of_plain_merged_forward_passes(setting, frozen, name):
    generator, _, variables = setting(name)
    made = jax.jit(generator.apply)(variables, frozen["cloud"], BATCH.prompts)
    losses = _losses_of_plain_passes(frozen, lambda p: merge(frozen["edge"], made.adapter.select(p)))
    validate = make_validation_step(generator, Decoder(EDGE), Config())
    np.testing.assert_allclose(validate(variables, frozen, BATCH), np.mean(losses), **SAME)
    base = _losses_of_plain_passes(frozen, lambda p: frozen["edge"])
    assert abs(np.mean(base) - np.mean(losses)) > 1e-3
    np.testing.assert_allclose(validate(None, frozen, BATCH), np.mean(base), **SAME)


@pytest.fixture(scope="module")
def loss_of(frozen):
    return jax.jit(lambda batch: edge_loss(Decoder(EDGE), frozen["edge"], None, batch, {}))


def test_padding_and_unused_slots_change_nothing(loss_of):
    used = BATCH.weight_PS > 0
    assert 0 < used.sum() < used.size
    other = dataclasses.replace(
        BATCH,
        tokens_PT=np.where(BATCH.positions_PT < 0, 9, BATCH.tokens_PT),
        segments_PT=np.where(BATCH.positions_PT < 0, 1, BATCH.segments_PT),
        source_PS=np.where(used, BATCH.source_PS, 5),
        target_PS=np.where(used, BATCH.target_PS, 11),
    )
    np.testing.assert_array_equal(loss_of(other), loss_of(BATCH))


def test_only_answer_tokens_are_supervised():
    """The targets are the responses, each predicted from the token before it."""
    for p, group in enumerate(GROUPS):
        used = BATCH.weight_PS[p] > 0
        assert BATCH.target_PS[p][used].tolist() == [t for _, response in group.queries for t in response]
        expected = [ids[i] for q, r in group.queries for ids in [q + r] for i in range(len(q) - 1, len(q + r) - 1)]
        assert BATCH.tokens_PT[p][BATCH.source_PS[p][used]].tolist() == expected


def test_queries_of_one_prompt_do_not_see_each_other(loss_of):
    """Only the first query's answers are weighed; the other queries' tokens do not matter then."""
    first = BATCH.segments_PT == 1
    own = np.take_along_axis(first, BATCH.source_PS, axis=1) & (BATCH.weight_PS > 0)
    alone = dataclasses.replace(BATCH, weight_PS=own.astype(np.float32))
    other = dataclasses.replace(alone, tokens_PT=np.where(first, BATCH.tokens_PT, 17))
    np.testing.assert_allclose(loss_of(other), loss_of(alone), **SAME)
    assert abs(float(loss_of(alone)) - float(loss_of(BATCH))) > 1e-3


def test_a_batch_without_any_weight_has_loss_zero(loss_of):
    assert float(loss_of(dataclasses.replace(BATCH, weight_PS=np.zeros_like(BATCH.weight_PS)))) == 0


def test_the_objective_adds_the_weighted_balance_loss(setting, gradient_fn, frozen):
    generator, _, variables = setting("shared")
    (total, (_, metrics)), _ = gradient_fn("shared")(variables["params"])
    generated, _ = generator.apply(variables, frozen["cloud"], BATCH.prompts, True, mutable=["batch_stats"])
    cv = float(cv_squared(generated.gates.dense()))
    assert cv > 1e-3
    np.testing.assert_allclose(metrics["cv"], cv, **SAME)
    np.testing.assert_allclose(total, float(metrics["loss"]) + 0.3 * cv, **SAME)


def test_a_step_updates_state_and_statistics_and_no_frozen_weight(setting, frozen):
    generator, config, _ = setting("shared")
    optimizer = make_optimizer(config.train)
    state = init_state(generator, optimizer, frozen, BATCH, seed=0)
    before = jax.tree.map(lambda x: np.array(x, copy=True), (state.params, frozen))
    step = make_train_step(generator, Decoder(EDGE), optimizer, config)
    state, metrics = step(state, frozen, BATCH)
    assert int(state.step) == 1
    assert float(state.batch_stats["router"]["norm"]["weight"]) == pytest.approx(0.1)
    assert float(metrics["answer_tokens"]) == sum(len(r) for g in GROUPS for _, r in g.queries)
    assert np.any(np.asarray(state.params["pool"]["up_b"]) != before[0]["pool"]["up_b"])
    jax.tree.map(np.testing.assert_array_equal, frozen, before[1])


def test_every_step_draws_its_own_dropout(setting, frozen):
    _, config, variables = setting("shared")
    config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, dropout=0.5))
    generator, optimizer = LoRAGen(Decoder(CLOUD), EDGE, config.generator), make_optimizer(config.train)
    step = make_train_step(generator, Decoder(EDGE), optimizer, config)

    def loss(number):
        # The step takes the memory of its state.
        params, stats = jax.tree.map(jnp.copy, (variables["params"], variables["batch_stats"]))
        state = TrainState(jnp.asarray(number, jnp.int32), params, stats, optimizer.init(params))
        return float(step(state, frozen, BATCH)[1]["loss"])

    assert loss(0) == loss(0)
    assert abs(loss(0) - loss(1)) > 1e-4


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 2, 2), (1, 1, 4)])
def test_the_state_stays_whole_on_every_device(setting, frozen, sizes):
    """In pieces it would make the next step another program."""
    generator, config, _ = setting("shared")
    optimizer, mesh = make_optimizer(config.train), make_mesh(*sizes)
    state = jax.eval_shape(lambda: init_state(generator, optimizer, frozen, BATCH, seed=0))

    def on(tree, *axes):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    with jax.set_mesh(mesh):
        step = make_train_step(generator, Decoder(EDGE), optimizer, config)
        compiled = step.lower(on(state), on(frozen), on(BATCH)).compile()
    after, _ = compiled.output_shardings
    assert len(jax.tree.leaves(after)) == len(jax.tree.leaves(state))
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(after))
