"""What can be set about refining, and what is said about a value that cannot work."""

import pytest

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.specialization.settings import RefineConfig, default_refinement


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "weights"}, "refine.kind is 'weights'; it must be one of gates, lora"),
        ({"stopping": "early"}, "refine.stopping is 'early'; it must be one of fixed, folds, held_out"),
        ({"steps": -1}, "refine.steps is -1; it must be a whole number from 0 to 1000"),
        ({"steps": 2.5}, "refine.steps is 2.5"),
        ({"steps": True}, "refine.steps is True"),
        ({"folds": 1}, "refine.folds is 1; it must be a whole number from 2 to 64"),
        ({"rank": 0}, "refine.rank is 0"),
        ({"learning_rate": -0.1}, "refine.learning_rate is -0.1; it must be a number of at least 0"),
        ({"learning_rate": float("inf")}, "refine.learning_rate is inf"),
        ({"pull": float("nan")}, "refine.pull is nan"),
        ({"pull": "strong"}, "refine.pull is 'strong'"),
        ({"pull": 6.0}, "refine.pull is 6.0: times the learning rate 0.2 it exceeds 1"),
    ],
)
def test_a_value_that_cannot_work_is_named(changes, words):
    with pytest.raises(ConfigError) as error:
        RefineConfig(**changes)
    assert words in str(error.value)


def test_each_kind_has_steps_and_a_rate_of_its_own():
    assert (RefineConfig().most_steps, RefineConfig().rate) == (10, 0.2)
    assert (RefineConfig("lora").most_steps, RefineConfig("lora").rate) == (4, 1e-3)
    assert (RefineConfig(steps=0).most_steps, RefineConfig(learning_rate=0.0).rate) == (0, 0.0)


def test_what_is_asked_for_counts_before_the_default():
    assert default_refinement(5, "lora", 7).most_steps == 7
    assert default_refinement(5, "lora").kind == "lora"
    assert default_refinement(5, steps=3).most_steps == 3
