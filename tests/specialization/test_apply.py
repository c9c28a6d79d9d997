"""Refined specializations of a generator: stored as others are, read again, refined on; the pocket pair's, too."""

import dataclasses

import numpy as np
import pytest
from helpers import experiment, generator_variables, raises

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.adapters.specialization import load_specialization, save_specialization
from lora_gen_jax.data.pocket import suite
from lora_gen_jax.data.prompts import evaluation_shots
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.generator.cloud import pack_prompts
from lora_gen_jax.generator.router import keep_top_k
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.scoring import Request, score
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import load_pair
from lora_gen_jax.specialization import apply
from lora_gen_jax.specialization.apply import logits_of
from lora_gen_jax.specialization.prompt import Prompt
from lora_gen_jax.specialization.settings import RefineConfig
from lora_gen_jax.specializer import Specializer
from lora_gen_jax.training.checkpoint import Loaded, load_checkpoint, versions

PROMPTS = [
    Prompt("say red what is the color ?", [("the sun is", "red"), ("what is the moon", "green or blue")]),
    Prompt("count one two three", [("one", "two"), ("two", "three"), ("four is", "five six")]),
    Prompt("", [("name a cat", "dog")]),
]


@pytest.fixture(scope="module")
def of_routing(tmp_path_factory):
    """A function: a `Specializer` with random weights and another routing, or other fields of the generator."""
    root, cache = tmp_path_factory.mktemp("refine"), {}

    def make(**changes):
        key = tuple(changes.items())
        if key not in cache:
            config = experiment(root, root / "run")
            config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, **changes))
            pair = load_pair(config)
            generator = make_generator(config, pair)
            prompts = pack_prompts([pair.cloud.encoder.prompt(p.text()) for p in PROMPTS], 2, 3, 64)
            variables = generator_variables(generator, pair.cloud.params, prompts, seed=3)
            cache[key] = Specializer(Loaded(1, variables, config, pair.fingerprints, versions(), root), pair)
        return cache[key]

    return make


@pytest.mark.parametrize("routing", ["keep_top_k", "linear", "gumbel", "gumbel_top_k"])
@pytest.mark.parametrize("kind", ["gates", "lora", "both"])
def test_refined_while_specializing_is_refined_afterwards(of_routing, routing, kind, tmp_path):
    """Rows of another shape; and logits of stored gates, rounded: Adam makes 1e-4 · rate of 1e-4, in three steps."""
    specializer = of_routing(routing=routing)
    config = RefineConfig(kind, steps=3, rank=2)
    at_once = specializer.specialize(PROMPTS, refine=config)
    read = specializer.specialize(PROMPTS)
    for number, (one, first, prompt) in enumerate(zip(at_once, read, PROMPTS, strict=True)):
        later = specializer.refine(first, prompt.examples, config)
        assert first.refined is None
        assert one.refined is not None
        assert one.refined | {"loss_before": 0, "loss_after": 0} == {
            "kind": kind,
            "examples": len(prompt.examples),
            "steps": 5 if kind == "both" else 3,
            "loss_before": 0,
            "loss_after": 0,
        }
        assert one.refined["loss_after"] < one.refined["loss_before"]
        # Half a step of signed bytes.
        stored = float(np.abs(one.gates(4).dense()).max()) / 254 if routing == "linear" else 0
        atol = 3 * 1e-4 * 0.2 + 2 * stored
        np.testing.assert_allclose(later.gates(4).dense(), one.gates(4).dense(), atol=atol)
        assert {name: x.shape for name, x in later.tensors.items()} == {n: x.shape for n, x in one.tensors.items()}
        assert bool(one.factors) == (kind != "gates")
        save_specialization(one, tmp_path / str(number))
        loaded = load_specialization(tmp_path / str(number))
        assert loaded.refined == one.refined
        for name, value in one.tensors.items():
            np.testing.assert_array_equal(loaded.tensors[name], value)
        # What the file says is what was reached.
        again = specializer.refine(loaded, prompt.examples, RefineConfig(kind, steps=0))
        assert again.refined is not None
        # Two float32 programs: two layers of seven sums of 48 products each, and a loss of order 1. Each step moved all
        # gates by about 0.2 / √4 against their slopes; what stored ones are off moves them by so much less.
        fell = one.refined["loss_before"] - one.refined["loss_after"]
        tolerance = 2 * 2 * 7 * 48 * 2.0**-24 + (4 * fell * stored / (3 * 0.1) if kind != "lora" else 0)
        assert again.refined["loss_before"] == pytest.approx(one.refined["loss_after"], abs=tolerance)


def test_prompts_of_a_batch_are_read_and_refined_as_alone(of_routing):
    specializer = of_routing(routing="keep_top_k")
    config = RefineConfig(steps=2)
    seen = []
    together = specializer.specialize([*PROMPTS, *PROMPTS], lambda done, total: seen.append((done, total)), 32, config)
    assert seen[-1] == (6, 6)
    # As above, in two steps.
    for prompt, one, twin in zip(PROMPTS, together[:3], together[3:], strict=True):
        (alone,) = specializer.specialize([prompt], refine=config)
        np.testing.assert_allclose(alone.gates(4).dense(), one.gates(4).dense(), atol=2 * 1e-4 * 0.2)
        np.testing.assert_allclose(twin.gates(4).dense(), one.gates(4).dense(), atol=2 * 1e-4 * 0.2)
        assert one.prompt == alone.prompt == prompt.text()


def test_batches_have_a_limit(of_routing, monkeypatch):
    specializer, sizes = of_routing(routing="keep_top_k"), []
    inner = apply.refine
    monkeypatch.setattr(apply, "refine", lambda *args: sizes.append(len(args[3])) or inner(*args))
    monkeypatch.setattr(apply, "TOKENS_AT_ONCE", 100)
    specializer.specialize([PROMPTS[0]] * 5, refine=RefineConfig(steps=1))
    assert sum(sizes) == 5
    assert len(sizes) > 1
    assert all(size & (size - 1) == 0 or size == sizes[-1] for size in sizes)


def test_no_step_leaves_the_specialization_as_it_was_read(of_routing):
    specializer = of_routing(routing="keep_top_k")
    (read,) = specializer.specialize(PROMPTS[:1])
    for kind in ("gates", "lora", "both"):
        (kept,) = specializer.specialize(PROMPTS[:1], refine=RefineConfig(kind, steps=0))
        assert kept.tensors.keys() == read.tensors.keys()
        for name, value in read.tensors.items():
            np.testing.assert_array_equal(kept.tensors[name], value)


@pytest.mark.usefixtures("float64")
def test_prompts_without_examples_are_only_read(of_routing):
    specializer = of_routing(routing="keep_top_k")
    made = specializer.specialize(["say red", PROMPTS[0], Prompt("say blue")], refine=RefineConfig(steps=2))
    assert [one.refined is None for one in made] == [True, False, True]
    (read,) = specializer.specialize(["say red"])
    # Both are stored in float32.
    np.testing.assert_allclose(made[0].gates(4).dense(), read.gates(4).dense(), rtol=2.0**-23)


def test_a_generators_config_says_how_its_specializations_learn(of_routing):
    specializer = of_routing(routing="keep_top_k")
    evaluation = dataclasses.replace(
        specializer.config.eval, refine=RefineConfig(steps=3, pull=0.5), refine_lora=RefineConfig("lora", rank=2)
    )
    loaded = dataclasses.replace(specializer.loaded, config=dataclasses.replace(specializer.config, eval=evaluation))
    own = Specializer(loaded, specializer.pair)
    assert own.refinement() == own.refinement("gates") == evaluation.refine
    assert own.refinement("lora") == evaluation.refine_lora
    assert own.refinement("both") == RefineConfig("both", steps=3, pull=0.5, rank=2)
    assert own.refinement("lora", 7) == RefineConfig("lora", rank=2, steps=7)
    (read,) = own.specialize(PROMPTS[:1])
    assert own.refine(read, PROMPTS[0].examples).refined["steps"] == 3
    with raises(ConfigError, "refine.steps", -1):
        own.refinement(steps=-1)


def test_examples_beyond_the_limit_are_learned_from_and_not_read(of_routing):
    specializer = of_routing(routing="keep_top_k")
    many = Prompt("say the color", [("what is the color of the sun and the moon ?", "red or blue")] * 20)
    (made,) = specializer.specialize([many], refine=RefineConfig(steps=1))
    assert made.refined is not None
    assert made.refined["examples"] == 20
    assert 1 < made.prompt.count("what is") < 20
    assert len(specializer.ids(made.prompt)) <= specializer.limit
    with raises(DataError, "prompt", specializer.limit):
        specializer.specialize([Prompt("red " * 300, many.examples)])


def test_what_cannot_be_refined_is_said_before_anything_is_read(of_routing, monkeypatch):
    specializer = of_routing(routing="keep_top_k")
    monkeypatch.setattr("lora_gen_jax.specializer.specialize", lambda *_: pytest.fail("a prompt was read"))
    long = Prompt("say", [("red " * 170, "blue")])
    with raises(DataError, "examples.1.0", "prompt 2", 160):
        specializer.specialize([PROMPTS[0], long], refine=RefineConfig())
    edge = dataclasses.replace(specializer.pair.edge, params=None)
    blind = Specializer(specializer.loaded, dataclasses.replace(specializer.pair, edge=edge))
    with raises(ConfigError, "edge_weights"):
        blind.specialize(PROMPTS, refine=RefineConfig())
    direct = of_routing(generator="direct")
    with raises(ConfigError, "generator"):
        direct.specialize(PROMPTS, refine=RefineConfig())


def test_a_rate_that_diverges_is_an_error_and_not_a_file(of_routing):
    specializer = of_routing(routing="linear")
    with raises(ConfigError, "refine.learning_rate", "1e+30"):
        specializer.specialize(PROMPTS, refine=RefineConfig(steps=3, learning_rate=1e30))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_logits_of_stored_gates_give_these_gates(of_routing, top_k):
    """As read where nothing was refined; and another choice than what is read now stays a choice."""
    settings = dataclasses.replace(of_routing(routing="keep_top_k").config.generator, top_k=top_k)
    rng = np.random.default_rng(0)
    # No near ties, which the choice would be moved away from; and no probability p near 1, with 1 / (1 - p) below 8.
    spread = np.tile([-2, -0.5, 0.5, 2], (7, 1))
    read, other = ((rng.permuted(spread, axis=1) + rng.uniform(-0.3, 0.3, (7, 4))).astype(np.float32) for _ in range(2))

    def gates(logits_LE):
        return np.asarray(keep_top_k(np.exp(logits_LE) / np.exp(logits_LE).sum(1, keepdims=True), top_k).dense())

    # Numbers below 4 that are rounded five times, and the logarithm of p / (1 - p), where p has eight roundings. A gate
    # is off by what its logit and the sum of all are off, and by its own roundings.
    of_logits = (5 * 4 + 8 * 8) * 2.0**-24
    of_gates = 2 * of_logits + 8 * 2.0**-24
    np.testing.assert_allclose(logits_of(gates(read), read, settings), read, rtol=0, atol=of_logits)
    found = logits_of(gates(other), read, settings)
    if top_k > 1:
        np.testing.assert_allclose(gates(found), gates(other), rtol=of_gates)
    else:  # a single gate is kept even where the choice is another's now
        probability = np.exp(found) / np.exp(found).sum(axis=1, keepdims=True)
        chosen = gates(other) > 0
        np.testing.assert_allclose(probability[chosen], gates(other)[chosen], rtol=of_gates)


@pytest.fixture(scope="module")
def pocket():
    loaded = load_checkpoint("quickstart")
    return Specializer(loaded, load_pair(loaded.config))


def held_out_loss(specializer, specialization, task):
    """Mean of a token of the answers to queries that no example has: merged weights, scored as evaluations do."""
    edge = specializer.pair.edge
    params = merge(edge.params, specializer.adapter(specialization))
    pairs = [edge.encoder.query(example, False) for example in task.test[:12]]
    found = score(
        EdgeModel(edge.decoder, params), [Request(query, [answer]) for query, answer in pairs], batch_tokens=1024
    )
    return -sum(one.logprobs[0] for one in found) / sum(len(answer) for _, answer in pairs)


@pytest.mark.parametrize("kind", ["gates", "lora"])
def test_examples_put_right_what_another_tasks_description_said_wrong(pocket, kind):
    tasks = suite.find("pocket_unseen")[:6]
    shots = [evaluation_shots(task, 5, seed=0) for task in tasks]
    wrong = [task.descriptions[0] for task in [*tasks[1:], tasks[0]]]
    read = pocket.specialize(wrong)
    config = RefineConfig(kind, steps=None if kind == "gates" else 10)
    refined = [pocket.refine(one, own, config) for one, own in zip(read, shots, strict=True)]
    before = [held_out_loss(pocket, one, task) for one, task in zip(read, tasks, strict=True)]
    after = [held_out_loss(pocket, one, task) for one, task in zip(refined, tasks, strict=True)]
    assert np.mean(after) < 0.6 * np.mean(before)
    assert sum(a < b for a, b in zip(after, before, strict=True)) >= 5
    for one, own in zip(refined, shots, strict=True):
        assert one.refined is not None
        assert one.refined["examples"] == len(own)
