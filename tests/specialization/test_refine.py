"""Refining by steps on examples: what a plain rendering of it gives, for each prompt by itself; nothing else moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CLOUD,
    EDGE,
    SAME,
    SETTINGS,
    generator_variables,
    logits,
    prompts_of,
    raises,
    random_params,
    token_rows,
)

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.adapters.refined import RefinedPool
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.generator.router import Gates, keep_top_k
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.generator.trained_module import Generated
from lora_gen_jax.specialization import refine as module
from lora_gen_jax.specialization.refine import FACTOR_SCALE, PATIENCE, refine
from lora_gen_jax.specialization.rows import pack_examples
from lora_gen_jax.specialization.settings import RefineConfig

DECODER = Decoder(EDGE)
PARAMS = random_params(EDGE, seed=5)


def examples_of(count, seed=0, longest=9):
    """Token ids of queries and answers, of many lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, 2 * count).tolist()
    rows = token_rows(lengths, EDGE.vocab_size, seed)
    return list(zip(rows[::2], rows[1::2], strict=True))


EXAMPLES = [examples_of(4, seed=1), examples_of(2, seed=2), examples_of(7, seed=3)]


@pytest.fixture(scope="module")
def made():
    """A function: (settings, what the generator says about three prompts) of a variant."""
    frozen, cache = random_params(CLOUD, seed=2), {}

    def get(**changes):
        key = (*sorted(changes.items()), jax.config.jax_enable_x64)
        if key not in cache:
            settings = dataclasses.replace(SETTINGS, **changes)
            generator = LoRAGen(Decoder(CLOUD), EDGE, settings)
            variables = generator_variables(generator, frozen, prompts_of([4], 1, 16))
            prompts = token_rows([7, 5, 9], CLOUD.vocab_size)
            cache[key] = settings, specialize(generator, variables, frozen, prompts)
        return cache[key]

    return get


def run(made, config, examples=EXAMPLES, **changes):
    settings, generated = made(**changes)
    return refine(DECODER, PARAMS, generated, examples, settings, config)


def one_of(generated, p):
    """A single prompt's."""
    gates, logits_PLE = jax.tree.map(lambda x: x[p : p + 1], (generated.gates, generated.logits_PLE))
    return Generated(generated.adapter.take(np.array([p])), gates, logits_PLE)


def plain_loss(params, examples):
    """Mean cross-entropy of all answer tokens, every example alone in a row, with merged weights.

    Rows are of one length, for one program: what follows an answer changes nothing before it.
    """
    total, tokens = 0.0, 0
    for query, answer in examples:
        ids, wanted = np.zeros((1, 16), np.int32), np.zeros((16, EDGE.vocab_size), np.float32)
        ids[0, : len(query) + len(answer) - 1] = [*query, *answer[:-1]]
        wanted[np.arange(len(query) - 1, len(query) - 1 + len(answer)), answer] = 1
        total -= jnp.sum(jax.nn.log_softmax(logits(DECODER, params, ids))[0] * wanted)
        tokens += len(answer)
    return total / np.float32(tokens)


VARIANTS = [
    {},
    {"routing": "linear"},
    {"routing": "gumbel"},
    {"routing": "gumbel_top_k"},
    {"pool": "per_layer"},
    {"mix": "factors"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(c.values()) or "default")
def test_losses_before_and_after_are_those_of_merged_weights(made, changes):
    """Different sums in fp32: values of about 4 agree to a few units of their last place, 5e-7, over three layers."""
    _, generated = made(**changes)
    # Small steps: an expert that comes in is not one that these random ones agree with.
    found = run(made, RefineConfig(steps=3, learning_rate=0.03), **changes)
    for p, examples in enumerate(EXAMPLES):
        before = plain_loss(merge(PARAMS, generated.adapter.select(p)), examples)
        after = plain_loss(merge(PARAMS, found.adapter.select(p)), examples)
        np.testing.assert_allclose(found.before_P[p], before, rtol=1e-5)
        np.testing.assert_allclose(found.after_P[p], after, rtol=1e-5)
        assert found.after_P[p] < found.before_P[p]
    assert found.steps_P.tolist() == [3, 3, 3]
    assert found.held_P is None


def test_factors_stand_beside_a_generated_update_that_stays(made):
    _, generated = made()
    found = run(made, RefineConfig("lora", steps=3, rank=2, learning_rate=3e-2))
    np.testing.assert_array_equal(found.gates.dense(), generated.gates.dense())
    assert isinstance(found.adapter, RefinedPool)
    assert {site: pair["a"].shape for site, pair in found.factors.items()} == {
        site: (3, 3, EDGE.site_shape(site)[0], 2) for site in EDGE.ffn_sites
    }
    for p, examples in enumerate(EXAMPLES):
        after = plain_loss(merge(PARAMS, found.adapter.select(p)), examples)
        np.testing.assert_allclose(found.after_P[p], after, rtol=1e-5)
        assert found.after_P[p] < found.before_P[p]
    start = run(made, RefineConfig("lora", steps=0, rank=2))
    assert not np.any(start.factors["up"]["b"])
    np.testing.assert_array_equal(start.before_P, start.after_P)
    np.testing.assert_array_equal(start.steps_P, 0)


def plain_adam(loss, start, steps, rate, pull):
    """Adam by its paper's equations, and the way back to the start."""
    x, m, v = start, np.zeros_like(start), np.zeros_like(start)
    for t in range(1, steps + 1):
        g = np.asarray(jax.grad(loss)(x))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        x = (x - rate * (step + pull * (x - start))).astype(np.float32)
    return x


@pytest.mark.parametrize("pull", [0.0, 0.5])
def test_gates_take_the_steps_of_a_plain_rendering(made, pull):
    """Of one prompt, its examples one after the other, merged.

    Adam divides a gradient by its own size: a relative error of 1e-4, of entries that nearly cancel, moves a value by
    1e-4 · rate in each of three steps.
    """
    settings, generated = made()
    config = RefineConfig(steps=3, learning_rate=0.1, pull=pull)
    found = run(made, config)
    single = generated.adapter.select(1)

    def gates_of(logits_LE):
        soft_LE = jax.nn.softmax(jnp.asarray(logits_LE), axis=-1)
        return soft_LE + jax.lax.stop_gradient(keep_top_k(soft_LE, settings.top_k).dense() - soft_LE)

    def loss(logits_LE):
        own = single.with_gates(Gates.of_all(gates_of(logits_LE)[:, None]))
        return plain_loss(merge(PARAMS, own), EXAMPLES[1])

    start = np.asarray(generated.logits_PLE[1])
    expected = plain_adam(loss, start, 3, 0.1, pull)
    gates = gates_of(expected)
    np.testing.assert_allclose(found.gates.dense()[1], gates, atol=3 * 1e-4 * 0.1)
    assert np.abs(found.gates.dense()[1] - generated.gates.dense()[1]).max() > 0.01


def test_factors_take_the_steps_of_a_plain_rendering(made):
    """B's first step from zero, and both factors' second; the tolerance is that of gates."""
    rate, site = 1e-2, "up"
    start = run(made, RefineConfig("lora", steps=0, rank=2)).adapter.select(1)
    found = run(made, RefineConfig("lora", steps=2, rank=2, learning_rate=rate)).adapter.select(1)

    def loss(b_L1XF, factors=start.scanned["factors"]):
        changed = {**factors, site: {**factors[site], "b": b_L1XF}}
        return plain_loss(merge(PARAMS, RefinedPool.of(start.generated, changed)), EXAMPLES[1])

    expected = plain_adam(loss, np.zeros_like(start.scanned["factors"][site]["b"]), 1, rate, 0.0)
    once = run(made, RefineConfig("lora", steps=1, rank=2, learning_rate=rate)).adapter.select(1)
    np.testing.assert_allclose(once.scanned["factors"][site]["b"], expected, atol=1e-4 * rate)
    # A has no gradient while B is zero; at the second step it moves by rate · its scale.
    for x in once, found:
        moved = np.abs(np.asarray(x.scanned["factors"][site]["a"] - start.scanned["factors"][site]["a"]))
        assert (moved.max() > 0) == (x is found)
        assert moved.max() <= FACTOR_SCALE * rate * 1.001


def test_both_are_gates_and_then_factors(made):
    settings, generated = made()
    found = run(made, RefineConfig("both", steps=2, rank=2, learning_rate=0.03))
    first = run(made, RefineConfig("gates", steps=2, learning_rate=0.03))
    then = refine(
        DECODER,
        PARAMS,
        generated.replace(adapter=first.adapter),
        EXAMPLES,
        settings,
        RefineConfig("lora", steps=2, rank=2),
    )
    np.testing.assert_array_equal(found.gates.dense(), first.gates.dense())
    jax.tree.map(np.testing.assert_array_equal, found.factors, then.factors)
    np.testing.assert_array_equal(found.before_P, first.before_P)
    np.testing.assert_array_equal(found.after_P, then.after_P)
    assert found.steps_P.tolist() == [4, 4, 4]


@pytest.mark.parametrize("kind", ["gates", "lora"])
@pytest.mark.parametrize("stopping", ["fixed", "folds"])
@pytest.mark.usefixtures("float64")
def test_a_batch_of_prompts_is_each_of_them_alone(made, kind, stopping):
    """Rows of other shapes sum in another order. In float32 Adam makes a step of a gradient that is rounding alone."""
    settings, generated = made()
    params = jax.tree.map(lambda x: jnp.asarray(x, float), PARAMS)
    config = RefineConfig(kind, steps=4, stopping=stopping, folds=2)
    together = refine(DECODER, params, generated, EXAMPLES, settings, config)
    for p in range(3):
        alone = refine(DECODER, params, one_of(generated, p), EXAMPLES[p : p + 1], settings, config)
        assert alone.steps_P[0] == together.steps_P[p]
        assert alone.after_P.dtype == np.float64
        np.testing.assert_allclose(alone.gates.dense()[0], together.gates.dense()[p], **SAME)
        np.testing.assert_allclose(alone.after_P[0], together.after_P[p], **SAME)
        if kind == "lora":
            for site in EDGE.ffn_sites:
                for x in "ab":
                    own, shared = alone.factors[site][x][:, 0], together.factors[site][x][:, p]
                    np.testing.assert_allclose(own, shared, **SAME)


@pytest.mark.parametrize("kind", ["gates", "lora"])
def test_pool_and_edge_model_stay_bit_for_bit(made, kind):
    settings, generated = made()
    before = jax.tree.map(np.array, (PARAMS, generated.adapter.shared))
    found = refine(DECODER, PARAMS, generated, EXAMPLES, settings, RefineConfig(kind, steps=2))
    jax.tree.map(np.testing.assert_array_equal, (PARAMS, generated.adapter.shared), before)
    jax.tree.map(np.testing.assert_array_equal, found.adapter.shared, before[1])


def test_all_experts_learn_by_the_gradient_of_the_softmax_over_all_of_them(made):
    """Straight-through: outputs of the K chosen gates; dL/dlogit = p_e · (dL/dG_e - Σ_j p_j · dL/dG_j)."""
    settings, generated = made()
    rows, _ = pack_examples(EXAMPLES, 3, RefineConfig())
    logits_LPE = jnp.asarray(generated.logits_PLE).transpose(1, 0, 2)
    form = module.Form("gates", "keep_top_k", settings.top_k, 1.0, 1, False)

    def loss(gates_LPE):
        """Of gates that are any numbers, all experts computed."""
        pool = generated.adapter.with_gates(Gates.of_all(gates_LPE))
        hidden, _ = DECODER.apply(
            {"params": PARAMS}, rows.tokens_BT, rows.positions_BT, segments_BT=rows.segments_BT, adapter=pool
        )
        hidden = jnp.take_along_axis(hidden, rows.source_BS[:, :, None], axis=1)
        loss_BS = module.slot_cross_entropy(DECODER, PARAMS, hidden, rows.target_BS) * rows.train_BS
        return jnp.sum(jnp.sum(loss_BS.reshape(3, -1), 1) / jnp.sum(rows.train_BS.reshape(3, -1), 1))

    value, of_gates = jax.value_and_grad(loss)(generated.gates.dense().transpose(1, 0, 2))
    p = jax.nn.softmax(logits_LPE, axis=-1)
    expected = p * (of_gates - jnp.sum(p * of_gates, axis=-1, keepdims=True))
    fixed = generated.adapter, rows
    (total, _), found = jax.value_and_grad(module._objective, has_aux=True)(
        {"gates": logits_LPE}, DECODER, form, PARAMS, fixed
    )
    # Two programs in float32: sums of some hundred terms, each rounded at 6e-8.
    np.testing.assert_allclose(total, value, rtol=1e-5)
    np.testing.assert_allclose(found["gates"], expected, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(expected))))
    outside = np.asarray(generated.gates.dense().transpose(1, 0, 2)) == 0
    assert np.all(np.asarray(found["gates"])[outside] != 0)


def test_an_expert_that_was_not_chosen_can_come_in(made):
    settings, generated = made()
    found = run(made, RefineConfig(steps=10, learning_rate=0.5))
    was, is_now = np.asarray(generated.gates.dense()) > 0, found.gates.dense() > 0
    assert np.any(was != is_now)
    np.testing.assert_array_equal(is_now.sum(axis=2), settings.top_k)
    np.testing.assert_allclose(found.gates.dense().sum(axis=2), 1.0, rtol=1e-6)


def test_the_step_that_counts_is_the_best_on_what_was_held_out(made):
    """Folds trained apart, with all steps fixed in advance, say which it is."""
    settings, generated = made()
    single, examples, most = one_of(generated, 2), EXAMPLES[2], 4
    rate = {"learning_rate": 0.4}
    found = refine(
        DECODER, PARAMS, single, [examples], settings, RefineConfig(steps=most, stopping="folds", folds=3, **rate)
    )
    held = []
    for steps in range(most + 1):
        total = tokens = 0.0
        for fold in range(3):
            learned = [e for i, e in enumerate(examples) if i % 3 != fold]
            out = [e for i, e in enumerate(examples) if i % 3 == fold]
            fixed = refine(DECODER, PARAMS, single, [learned], settings, RefineConfig(steps=steps, **rate))
            count = sum(len(answer) for _, answer in out)
            total += plain_loss(merge(PARAMS, fixed.adapter.select(0)), out) * count
            tokens += count
        held.append(float(total / tokens))
    best = int(np.argmin(held))
    assert found.steps_P.tolist() == [best]
    np.testing.assert_allclose(found.held_P, held[best], rtol=1e-4)
    whole = refine(DECODER, PARAMS, single, [examples], settings, RefineConfig(steps=best, **rate))
    np.testing.assert_allclose(found.gates.dense(), whole.gates.dense(), atol=4 * 1e-4 * 0.4)


def test_what_is_held_out_is_not_learned_from(made):
    settings, generated = made()
    single, examples = one_of(generated, 2), EXAMPLES[2]
    found = refine(
        DECODER, PARAMS, single, [examples], settings, RefineConfig(steps=3, stopping="held_out", learning_rate=0.05)
    )
    learned = [e for i, e in enumerate(examples) if i != 4]
    fixed = refine(
        DECODER, PARAMS, single, [learned], settings, RefineConfig(steps=int(found.steps_P[0]), learning_rate=0.05)
    )
    np.testing.assert_allclose(found.gates.dense(), fixed.gates.dense(), atol=3 * 1e-4 * 0.05)
    np.testing.assert_allclose(
        found.held_P, plain_loss(merge(PARAMS, found.adapter.select(0)), examples[4:5]), rtol=1e-5
    )


def test_steps_that_only_harm_are_not_taken(made):
    _, generated = made()
    found = run(made, RefineConfig(steps=3, learning_rate=1e3, stopping="folds"))
    np.testing.assert_array_equal(found.steps_P, 0)
    np.testing.assert_allclose(found.gates.dense(), generated.gates.dense(), rtol=1e-6)
    np.testing.assert_array_equal(found.after_P, found.before_P)


def test_a_prompt_is_done_some_steps_after_its_best(made, monkeypatch):
    counted = []
    step = module._step
    monkeypatch.setattr(module, "_step", lambda *args: counted.append(0) or step(*args))
    found = run(made, RefineConfig(steps=200, learning_rate=0.3, stopping="folds"))
    assert len(counted) == found.steps_P.max() + PATIENCE + 1 < 200


def test_a_single_example_has_nothing_to_hold_out(made):
    settings, generated = made()
    single = one_of(generated, 0)
    config = RefineConfig(steps=2, stopping="folds")
    found = refine(DECODER, PARAMS, single, [EXAMPLES[0][:1]], settings, config)
    assert (found.steps_P.tolist(), found.held_P) == ([2], None)
    beside = refine(DECODER, PARAMS, generated, [EXAMPLES[0][:1], *EXAMPLES[1:]], settings, config)
    assert beside.steps_P[0] == 2
    assert beside.held_P is not None
    assert np.isnan(beside.held_P[0])
    np.testing.assert_allclose(beside.gates.dense()[0], found.gates.dense()[0], atol=2 * 1e-4 * config.rate)


def test_the_pull_holds_values_near_their_start(made):
    _, generated = made(routing="linear")
    free, held = (run(made, RefineConfig(steps=6, pull=pull), routing="linear").gates.weight for pull in (0.0, 5.0))
    start = np.asarray(generated.gates.dense())
    # With pull · rate = 1 every step starts from the start: Adam's own is never longer than rate·√10 here.
    bound = 0.2 * 10**0.5 * SETTINGS.num_experts**-0.5
    assert np.abs(held - start).max() <= bound
    assert np.abs(free - start).max() > np.abs(held - start).max()


def test_one_program_serves_every_batch_of_a_shape(made):
    settings, generated = made()
    config = RefineConfig(steps=2)
    jax.clear_caches()
    refine(DECODER, PARAMS, generated, EXAMPLES, settings, config)
    first = module._step._cache_size(), module._judge._cache_size()
    others = [examples_of(3, seed=7), examples_of(4, seed=8), examples_of(5, seed=9)]
    shapes = [jax.tree.map(np.shape, pack_examples(x, 4, config)) for x in (EXAMPLES, others)]
    assert shapes[0] == shapes[1], "the test's examples are of different buckets"
    refine(
        DECODER, PARAMS, generated, others, settings, dataclasses.replace(config, steps=4, learning_rate=0.1, pull=1.0)
    )
    assert (module._step._cache_size(), module._judge._cache_size()) == first == (1, 1)
    refine(DECODER, PARAMS, one_of(generated, 0), EXAMPLES[:1], settings, config)
    assert module._step._cache_size() == 2


@pytest.mark.parametrize(
    ("examples", "field", "facts"),
    [
        ([EXAMPLES[0], [], EXAMPLES[2]], "examples.1", ["prompt 2"]),
        ([EXAMPLES[0], [([], [3])], EXAMPLES[2]], "examples.1.0", ["example 1", "prompt 2", "query"]),
        ([EXAMPLES[0], [([3], [4]), ([3], [])], EXAMPLES[2]], "examples.1.1", ["example 2", "prompt 2", "answer"]),
        ([EXAMPLES[0], EXAMPLES[1], [([3] * 40, [4] * 40)]], "examples.2.0", ["prompt 3", 79, 64]),
        (EXAMPLES[:2], "examples", [2, 3]),
    ],
)
def test_examples_that_cannot_be_learned_from_are_named(made, examples, field, facts):
    settings, generated = made()
    with raises(DataError, field, *facts):
        refine(DECODER, PARAMS, generated, examples, settings, RefineConfig())


def test_ids_that_the_model_lacks_are_named(made):
    settings, generated = made()
    with pytest.raises(DataError, match=r"example 1 of prompt 3.*53"):
        refine(DECODER, PARAMS, generated, [*EXAMPLES[:2], [([3], [53])]], settings, RefineConfig())


def test_what_has_no_gates_or_no_logits_is_refused(made):
    direct, generated = made(generator="direct")
    with raises(ConfigError, "generator"):
        refine(DECODER, PARAMS, generated, EXAMPLES, direct, RefineConfig())
    settings, generated = made()
    with raises(ConfigError, "generated.logits_PLE"):
        refine(DECODER, PARAMS, generated.replace(logits_PLE=None), EXAMPLES, settings, RefineConfig())


def test_gates_learn_beside_factors_that_are_there(made):
    settings, generated = made()
    learned = run(made, RefineConfig("lora", steps=2, rank=2))
    again = refine(
        DECODER,
        PARAMS,
        generated.replace(adapter=learned.adapter),
        EXAMPLES,
        settings,
        RefineConfig(steps=2, learning_rate=0.03),
    )
    np.testing.assert_allclose(again.before_P, learned.after_P, rtol=1e-5)
    assert np.all(again.after_P < again.before_P)
    jax.tree.map(np.testing.assert_array_equal, again.factors, learned.factors)
    on = refine(
        DECODER, PARAMS, generated.replace(adapter=learned.adapter), EXAMPLES, settings, RefineConfig("lora", steps=1)
    )
    np.testing.assert_allclose(on.before_P, learned.after_P, rtol=1e-5)
    assert on.factors["up"]["a"].shape[-1] == 2, "factors that are there keep their rank"
