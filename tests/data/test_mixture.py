"""The mixture of sources: who is drawn how often, and how many steps an epoch of it is."""

import dataclasses
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import raises

from lora_gen_jax.config import Config, DataConfig, TrainConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.config_file import difference, from_json, read_config, to_json
from lora_gen_jax.data.mixture import chances, epoch_rows
from lora_gen_jax.data.reasoning import SEEN_TASKS
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.training.prepare import with_steps

CONFIGS = Path(__file__).parents[2] / "configs"


def _task(name, source, rows, held_out=0):
    example = Example("1", "q", " a")
    return Task(name, ("Say it.",), [example] * rows, (), [example] * held_out, source=source)


# A source of two tasks, one of a single task, and one that has nothing to train on.
TASKS = [_task("a", "x", 30, 1), _task("b", "x", 10, 1), _task("c", "y", 160), _task("d", "z", 0, 8)]


@pytest.mark.parametrize("weights", [{}, {"x": 3}, {"y": 0}])
@pytest.mark.parametrize("mixture", ["even", "size"])
def test_a_source_is_drawn_by_its_weight_and_where_asked_by_its_rows(mixture, weights):
    config = DataConfig(mixture=mixture, source_weights=tuple(f"{name}={w}" for name, w in weights.items()))
    rows = {"x": 40, "y": 160}
    shares = {s: Fraction(weights.get(s, 1)) * (n if mixture == "size" else 1) for s, n in rows.items()}
    total = sum(shares.values())
    expected = [shares["x"] / total * Fraction(n, 40) for n in (30, 10)] + [shares["y"] / total, 0]
    np.testing.assert_allclose(chances(config, TASKS, "train"), [float(x) for x in expected], rtol=1e-12)


def test_by_size_every_row_is_as_likely_as_any_other():
    chance = chances(DataConfig(mixture="size"), TASKS, "train")
    np.testing.assert_allclose([c / len(t.train) for c, t in zip(chance[:3], TASKS, strict=False)], 1 / 200, rtol=1e-12)


def test_each_split_has_the_sizes_of_its_own_rows():
    np.testing.assert_allclose(chances(DataConfig(mixture="size"), TASKS, "validation"), [0.1, 0.1, 0, 0.8])
    np.testing.assert_allclose(chances(DataConfig(), TASKS, "validation"), [0.25, 0.25, 0, 0.5])
    with raises(ConfigError, "data.source_weights", "train", code="zero"):
        chances(DataConfig(source_weights=("x=0", "y=0")), TASKS, "train")


@pytest.mark.parametrize("epochs", [0.1, 1, 2.5, 4])
@pytest.mark.parametrize("queries", [(16, 4), (7, 3), (64, 8)])
def test_steps_are_the_fewest_that_read_as_many_queries_as_the_epochs_have_rows(epochs, queries):
    data = DataConfig(prompts_per_step=queries[0], queries_per_prompt=queries[1], source_weights=("z=2",))
    config = Config(name="x", data=data, train=TrainConfig(steps=0, epochs=epochs))
    found, a_step = with_steps(config, TASKS).train, math.prod(queries)
    assert (found.steps - 1) * a_step < epochs * 200 <= found.steps * a_step
    assert found.epochs == epochs
    # Once more it is the same, and without epochs the number stays.
    assert with_steps(dataclasses.replace(config, train=found), TASKS).train == found
    fixed = dataclasses.replace(config, train=TrainConfig(steps=7))
    assert with_steps(fixed, TASKS) is fixed


def test_rows_that_are_never_drawn_are_in_no_epoch():
    assert epoch_rows(DataConfig(), TASKS) == 200
    assert epoch_rows(DataConfig(source_weights=("y=0",)), TASKS) == 40


# Training rows as the five sets were published.
PUBLISHED = {"arc_challenge": 1119, "arc_easy": 2251, "openbookqa": 4957, "boolq": 9427, "social_iqa": 33410}


@pytest.mark.parametrize("name", ["tinyllama_1b", "qwen2_1_5b", "gemma2_2b", "opt_2_7b"])
def test_the_papers_configs_read_every_row_four_times_in_updates_of_64_queries(name):
    """Table 10: batches of 64, four epochs, so 3198 updates."""
    config = check(read_config(CONFIGS / f"{name}.py"))
    assert set(config.data.tasks) == set(SEEN_TASKS) == set(PUBLISHED)
    tasks = [_task(task, task, rows) for task, rows in PUBLISHED.items()]
    queries = config.data.prompts_per_step * config.data.queries_per_prompt
    steps = with_steps(config, tasks).train.steps
    assert (queries, steps) == (64, math.ceil(4 * sum(PUBLISHED.values()) / 64)) == (64, 3198)
    passes = steps * queries * chances(config.data, tasks, "train") / list(PUBLISHED.values())
    # One query more or less in each source.
    np.testing.assert_allclose(passes, 4, rtol=64 / (4 * sum(PUBLISHED.values())))


@pytest.mark.parametrize(
    ("train", "field", "fact"),
    [
        (TrainConfig(epochs=4), "train.epochs", 1000),
        (TrainConfig(steps=0, epochs=0.0), "train.epochs", 0.0),
        (TrainConfig(steps=0), "train.steps", 0),
        (TrainConfig(steps=-1, epochs=4), "train.epochs", "train.steps"),
    ],
)
def test_steps_and_epochs_exclude_each_other(train, field, fact):
    with raises(ConfigError, field, fact):
        check(Config(name="x", train=train))
    check(Config(name="x", train=TrainConfig(steps=0, epochs=0.5)))


def test_a_run_with_epochs_is_the_same_experiment_with_and_without_its_number_of_steps():
    asked = Config(name="x", train=TrainConfig(steps=0, epochs=4))
    begun = to_json(with_steps(asked, TASKS))
    assert begun["train"]["steps"] > 0
    assert difference(to_json(from_json(begun)), to_json(asked)) == []
    other = dataclasses.replace(asked, train=TrainConfig(steps=0, epochs=5))
    assert difference(begun, to_json(other)) == ["train.epochs: 4 -> 5"]
