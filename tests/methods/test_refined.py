"""Steps on a prompt's own shots as methods of an evaluation: where they start, and that they help."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import logits, raises

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import EvalConfig
from lora_gen_jax.config_file import read_config
from lora_gen_jax.data.pocket.suite import find
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.systems import check_shots, make_systems
from lora_gen_jax.evaluation.task import task_prompt
from lora_gen_jax.methods.lorahub import shots_of
from lora_gen_jax.methods.refined import no_update
from lora_gen_jax.models import load_pair
from lora_gen_jax.specialization.settings import RefineConfig
from lora_gen_jax.training.checkpoint import load_checkpoint
from lora_gen_jax.training.portable import SHIPPED

METHODS = ("refined", "refined_lora", "refined_both", "equal_refined", "shots_lora")


@pytest.fixture(scope="module")
def config(request):
    config = read_config(request.config.rootpath / "configs" / "quickstart.py")
    return dataclasses.replace(config, eval=EvalConfig(shots=5, latency=False, lora_steps=4, lora_rate=3e-3))


@pytest.fixture(scope="module")
def pair(config):
    return load_pair(config)


@pytest.fixture(scope="module")
def checkpoints():
    return {"lora_gen": load_checkpoint(SHIPPED["quickstart"])}


@pytest.fixture(scope="module")
def task():
    return find("pocket/sound/quotes")[0]


def with_steps(config, steps):
    refine = {name: RefineConfig(kind, steps) for name, kind in (("refine", "gates"), ("refine_lora", "lora"))}
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **refine))


def params_of(config, pair, checkpoints, task, names):
    systems = make_systems(config, names, pair, checkpoints, [task])
    return {name: system.specialized_for(task).params for name, system in systems.items()}


def shots_loss(pair, params, task, settings):
    """Mean negative log-likelihood of the shots' answers, from plain passes."""
    losses = []
    for query, answer in shots_of(pair.edge, task_prompt(task, settings)):
        found = np.asarray(logits(pair.edge.decoder, params, np.array([[*query, *answer]], np.int32)))[0]
        found = found - jax.nn.logsumexp(found, axis=-1, keepdims=True)
        losses += [-found[len(query) + i - 1, token] for i, token in enumerate(answer)]
    return float(np.mean(losses))


def test_no_steps_leave_what_each_method_starts_from(config, pair, checkpoints, task):
    """LoRA-Gen's weights, the same for factors beside them, and those of the first K experts in equal parts."""
    found = params_of(with_steps(config, 0), pair, checkpoints, task, ("lora_gen", *METHODS[:4]))
    for name in METHODS[:3]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[name], found["lora_gen"])
    kernels = {name: np.asarray(params["layers"]["ffn"]["up"]["kernel"]) for name, params in found.items()}
    assert np.abs(kernels["equal_refined"] - kernels["lora_gen"]).max() > 1e-3
    equal = with_steps(config, 0)
    other = find("pocket/young/twice")[0]
    again = params_of(equal, pair, checkpoints, other, ("equal_refined",))["equal_refined"]
    np.testing.assert_array_equal(np.asarray(again["layers"]["ffn"]["up"]["kernel"]), kernels["equal_refined"])


def test_an_empty_pool_adds_nothing(pair):
    merged = merge(pair.edge.params, no_update(pair.edge.config))
    jax.tree.map(np.testing.assert_array_equal, merged, pair.edge.params)


def test_steps_lower_the_loss_of_the_shots(config, pair, checkpoints, task):
    before = params_of(with_steps(config, 0), pair, checkpoints, task, METHODS[:4])
    before["shots_lora"] = pair.edge.params
    after = params_of(config, pair, checkpoints, task, METHODS)
    for name in METHODS:
        old, new = (shots_loss(pair, params[name], task, config.eval) for params in (before, after))
        # Far more than rounding: of a mean over a handful of tokens, 1e-6.
        assert new < 0.95 * old, name


def test_what_results_depend_on(config, pair, checkpoints, task):
    def identities(config):
        systems = make_systems(config, METHODS, pair, checkpoints, [task])
        return [system.identity_for(task) for system in systems.values()]

    one = identities(config)
    assert len(set(one)) == len(METHODS)
    steps = identities(with_steps(config, 3))
    assert [a == b for a, b in zip(one, steps, strict=True)] == [False, False, False, False, True]
    rate = dataclasses.replace(config, eval=dataclasses.replace(config.eval, lora_rate=1e-2))
    assert [a == b for a, b in zip(one, identities(rate), strict=True)] == [True, True, True, True, False]


def test_they_need_shots():
    for name in METHODS:
        with raises(ConfigError, "eval.shots", name):
            check_shots([name], [0])
