"""Prompts in the edge's context: one packed row is as many plain sequences, and what fits a row."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from helpers import EDGE, SAME, logits, raises, random_params

from lora_gen_jax.config import Config, DataConfig, ModelConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.data.edge_prompt import beside, continued
from lora_gen_jax.data.pipeline import Group, GroupSampler, pack_groups
from lora_gen_jax.data.prompts import system_prompt
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.models import load_model
from lora_gen_jax.training.step import edge_loss

pytestmark = pytest.mark.float64
SHAPES = DataConfig(prompts_per_step=2, prompts_per_row=1, cloud_length=24, edge_length=32, response_slots=8)
DATA = DataConfig(
    prompts_per_step=1,
    cloud_length=128,
    edge_length=64,
    queries_per_prompt=4,
    response_slots=32,
    query_length=16,
    min_shots=2,
    max_shots=2,
    edge_reads_prompt=True,
)


def _groups(prefixed):
    rng, groups = np.random.default_rng(5), []
    for prefix, lengths in ((7, [(3, 2), (5, 1), (2, 3)]), (4, [(6, 3)])):
        ids = rng.integers(2, 53, prefix).tolist()
        queries = [tuple(rng.integers(2, 53, n).tolist() for n in pair) for pair in lengths]
        groups.append(Group("", (), ids, queries, ids if prefixed else []))
    return groups


def test_a_row_that_begins_with_its_prompt_has_the_loss_of_separate_rows():
    params, groups = random_params(EDGE, seed=3), _groups(prefixed=True)
    loss_of = jax.jit(lambda batch: edge_loss(Decoder(EDGE), params, None, batch, {}))
    separate = []
    for group in groups:
        for query, response in group.queries:
            ids = group.prefix + query + response
            row = np.asarray(logits(Decoder(EDGE), params, np.array([ids + [0] * (24 - len(ids))])), np.float64)[0]
            for i, target in enumerate(response):
                at = row[len(group.prefix) + len(query) + i - 1]
                separate.append(np.log(np.sum(np.exp(at - at.max()))) + at.max() - at[target])
    packed = pack_groups(groups, SHAPES, EDGE.num_layers)
    np.testing.assert_allclose(loss_of(packed), np.mean(separate), **SAME)
    without = loss_of(pack_groups(_groups(prefixed=False), SHAPES, EDGE.num_layers))
    assert abs(float(without) - np.mean(separate)) > 1e-2


def test_the_prompt_is_segment_0_and_queries_go_on_behind_it():
    batch = pack_groups(_groups(prefixed=True), SHAPES, EDGE.num_layers)
    assert batch.segments_PT[0].tolist()[:18] == [0] * 7 + [1] * 4 + [2] * 5 + [3] * 2
    assert batch.positions_PT[0].tolist()[:18] == [*range(7), *range(7, 11), *range(7, 12), 7, 8]
    assert batch.positions_PT[0].tolist()[20:] == [-1] * 12


@pytest.fixture(scope="module")
def encoder():
    return load_model(ModelConfig("pocket-edge")).encoder


@pytest.fixture
def draw(encoder):
    """A group drawn from one task with these changes to DATA."""

    def drawn(description="Say the color.", seed=0, **changes):
        rows = [Example(str(i), f"{thing}:", f" {color}") for i, (thing, color) in enumerate(_THINGS)]
        task = Task("colors", (description,), rows, rows, source="x")
        sampler = GroupSampler([task], encoder, encoder, dataclasses.replace(DATA, **changes), 4, "train")
        return sampler.draw(np.random.default_rng(seed))

    return drawn


def test_a_weight_may_name_a_source_without_validation_rows(encoder):
    rows = [Example(str(i), f"{thing}:", f" {color}") for i, (thing, color) in enumerate(_THINGS)]
    tasks = [Task("a", ("Say it.",), rows, (), rows[:2], source="a"), Task("b", ("Say it.",), rows, (), source="b")]

    def sampler(split, *weights):
        return GroupSampler(tasks, encoder, encoder, dataclasses.replace(DATA, source_weights=weights), 4, split)

    assert sampler("validation", "b=0.2").cumulative.tolist() == [1.0]
    np.testing.assert_allclose(sampler("train", "b=3").cumulative, [0.25, 1.0])
    with raises(ConfigError, "data.source_weights", "train.validation_batches", code="zero"):
        sampler("validation", "a=0")
    with raises(ConfigError, "data.source_weights", "'c'", "a, b", code="unknown"):
        sampler("validation", "c=1")


_THINGS = [("lemon", "yellow"), ("crow", "black"), ("milk", "white"), ("grass", "green"), ("sky", "blue")] + [
    (f"ball {i}", "red") for i in range(6)
]


def test_the_edge_reads_the_very_prompt_of_the_cloud(draw, encoder):
    group = draw()
    assert len(group.shots) == 2
    assert group.prefix == encoder.prompt(system_prompt(group.description, group.shots)) == group.prompt
    assert len(group.queries) == 4
    plain = draw(edge_reads_prompt=False)
    assert plain == dataclasses.replace(group, prefix=[])


def test_queries_give_way_before_shots_and_shots_before_the_last_query(draw):
    whole = draw(edge_length=200)
    taken = [len(query) + len(response) - 1 for query, response in whole.queries]
    for room, queries, shots in ((sum(taken), 4, 2), (sum(taken) - 1, 3, 2), (taken[0], 1, 2), (taken[0] - 1, None, 1)):
        group = draw(edge_length=len(whole.prefix) + room)
        assert len(group.shots) == shots
        if queries is not None:
            assert group.queries == whole.queries[:queries]
        assert group.queries[0] == whole.queries[0]
        assert len(group.prefix) + sum(len(q) + len(r) - 1 for q, r in group.queries) <= len(whole.prefix) + room


def test_a_prompt_that_leaves_no_room_is_an_error_that_names_the_row(draw):
    with raises(DataError, "data.query_length", "data.edge_length (30)"):
        draw(description="Say the color. " * 8, edge_length=30, min_shots=0, max_shots=0)


def _tokenizer_with(bos) -> Any:
    return SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=bos))


def test_only_one_bos_is_read():
    edge, without = (_tokenizer_with(bos) for bos in (1, None))
    assert continued(edge, [1, 8], [1, 5, 6]) == [5, 6]
    assert continued(edge, [8], [1, 5]) == [1, 5]
    assert continued(edge, [1, 8], [5, 1]) == [5, 1]
    assert continued(without, [1], [1, 5]) == [1, 5]
    # Two tokens of prompt, then 2 + 2 - 1, then 1 + 1 - 1: the third query would be the seventh token.
    queries = [([1, 5, 6], [7, 8]), ([9], [4]), ([3], [2])]
    assert beside(edge, [1, 8], queries, 6) == [([5, 6], [7, 8]), ([9], [4])]
    assert beside(edge, [1, 8], queries, 4) == []


@pytest.mark.parametrize("config", [Config(data=DATA), Config(method="lora", compare=("lora", "lora_gen"), data=DATA)])
def test_what_cannot_work(config):
    with raises(ConfigError, "data.edge_reads_prompt", "lora, lora_moe, mixlora"):
        check(config)
    for method in ("lora", "lora_moe", "mixlora"):
        assert check(Config(method=method, compare=("base", "icl", method), data=DATA)).data.edge_reads_prompt
