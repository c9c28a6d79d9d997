"""What can be set about refining, and what is said about a value that cannot work."""

import pytest
from helpers import raises

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.specialization.settings import RefineConfig


@pytest.mark.parametrize(
    ("changes", "field", "facts"),
    [
        ({"kind": "weights"}, "kind", ["weights", "gates", "lora", "both"]),
        ({"stopping": "early"}, "stopping", ["early", "fixed", "folds", "held_out"]),
        ({"steps": -1}, "steps", [-1, 0, 1000]),
        ({"steps": 2.5}, "steps", [2.5]),
        ({"steps": True}, "steps", ["True"]),
        ({"folds": 1}, "folds", [1, 2, 64]),
        ({"rank": 0}, "rank", [0, 1, 256]),
        ({"learning_rate": -0.1}, "learning_rate", [-0.1]),
        ({"learning_rate": float("inf")}, "learning_rate", ["inf"]),
        ({"pull": float("nan")}, "pull", ["nan"]),
        ({"pull": "strong"}, "pull", ["strong"]),
        ({"pull": 6.0}, "pull", [6.0, 0.2]),
    ],
)
def test_a_value_that_cannot_work_is_named(changes, field, facts):
    with raises(ConfigError, f"refine.{field}", *facts):
        RefineConfig(**changes)


def test_each_kind_has_steps_and_a_rate_of_its_own():
    assert (RefineConfig().most_steps, RefineConfig().rate) == (10, 0.2)
    assert (RefineConfig("lora").most_steps, RefineConfig("lora").rate) == (4, 1e-3)
    assert (RefineConfig("both").most_steps, RefineConfig("both").rate) == (10, 0.2)
    assert (RefineConfig(steps=0).most_steps, RefineConfig(learning_rate=0.0).rate) == (0, 0.0)


def test_both_are_gates_and_then_two_steps_of_factors():
    assert RefineConfig("lora", 3).stages == (RefineConfig("lora", 3),)
    gates, factors = RefineConfig("both", learning_rate=0.1, pull=0.5, rank=2).stages
    assert gates == RefineConfig("gates", learning_rate=0.1, pull=0.5, rank=2)
    assert factors == RefineConfig("lora", 2, rank=2)
    assert [stage.most_steps for stage in RefineConfig("both", 0).stages] == [0, 0]
