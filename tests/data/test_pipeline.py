"""Batches do not depend on who builds them: one process or several, a thread or worker processes, from any place."""

import copy
import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers import experiment, raises

from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.data.pipeline import Shard, TrainingBatches, build_batch, validation_batches
from lora_gen_jax.errors import CheckpointError, DataError
from lora_gen_jax.models import load_pair
from lora_gen_jax.training.prepare import make_sampler, training_tasks

# What a cloud row holds: everything, or so little that shots must be dropped.
ROOM = {"wide": 96, "narrow": 46}


@pytest.fixture(scope="module")
def sampler_of(tmp_path_factory):
    """Samplers of 8 rows with 2 prompts each, in blocks of 2 rows."""
    config = experiment(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run"))
    pair, tasks = load_pair(config), training_tasks(config)

    @functools.cache
    def make(split="train", room="wide", **changes):
        shape = {"prompts_per_step": 16, "rows_per_block": 2, "cloud_length": ROOM[room], "max_shots": 5}
        data = dataclasses.replace(config.data, **(shape | changes))
        return make_sampler(dataclasses.replace(config, data=data), pair, tasks, split)

    return make


def part(index, count, rows=8):
    return Shard(tuple(range(index * rows // count, (index + 1) * rows // count)))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def joined(parts):
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("room", ["wide", "narrow"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_parts_of_several_processes_are_the_batch_of_one(sampler_of, split, room, processes):
    """Eight processes hold half a block each."""
    sampler = sampler_of(split, room)
    for step in range(3):
        parts = [build_batch(sampler, (0, step), part(i, processes)) for i in range(processes)]
        same(joined(parts), build_batch(sampler, (0, step), Shard()))


def test_shots_are_dropped_in_the_narrow_rows(sampler_of):
    def shots(room):
        sampler = sampler_of("train", room)
        drawn = [sampler.draw(np.random.default_rng([0, 0, i])) for i in range(4)]
        return sum(len(group.shots) for group in sampler.rows(drawn)), sum(len(group.shots) for group in drawn)

    kept, drawn = shots("narrow")
    assert kept < drawn
    kept, drawn = shots("wide")
    assert kept == drawn


def long_and_short(sampler, share):
    """The sampler with a long description for that share of its tasks, and no shots."""
    changed = copy.copy(sampler)
    changed.config = dataclasses.replace(sampler.config, min_shots=0, max_shots=0)
    long = "red " * 30
    changed.tasks = [
        dataclasses.replace(task, descriptions=(long if i < share * len(sampler.tasks) else "red",))
        for i, task in enumerate(sampler.tasks)
    ]
    return changed


def test_long_prompts_that_meet_in_a_row_are_drawn_anew(sampler_of):
    """Two of them fit no row; each fits beside a short one."""
    sampler = long_and_short(sampler_of("train", "narrow"), 0.5)
    lengths = []
    for step in range(10):
        groups = sampler.block((0, step), range(16))
        for row in range(8):
            one, two = (len(group.prompt) for group in groups[2 * row : 2 * row + 2])
            assert one + two <= ROOM["narrow"] - 2 * sampler.num_meta
            lengths += [one, two]
        assert [g.prompt for g in sampler.block((0, step), range(16))] == [g.prompt for g in groups]
    # They are not left out for that.
    assert 0.2 < np.mean(np.array(lengths) > 20) <= 0.5
    same(build_batch(sampler, (0, 0), Shard()), joined([build_batch(sampler, (0, 0), part(i, 4)) for i in range(4)]))


def test_a_task_that_fits_beside_no_other_is_named_once(sampler_of, caplog):
    """The long one has 30 tokens, the room is for one short one more than that, less one."""
    sampler = long_and_short(sampler_of("train", "narrow"), 0.5)
    short, long = sorted({len(g.prompt) for g in (sampler.draw(np.random.default_rng([0, i])) for i in range(20))})
    for room, named in ((long + short, 0), (long + short - 1, 1)):
        sampler.config = dataclasses.replace(sampler.config, cloud_length=room + 2 * sampler.num_meta)
        for step in range(3):
            groups = sampler.block((0, step), range(16))
        assert sum("too long to share a row with 1 others" in text for text in caplog.messages) == named
        assert any(len(group.prompt) == long for group in groups) == (named == 0)


def test_prompts_that_are_all_too_long_name_the_fields(sampler_of):
    with raises(DataError, "data.cloud_length", 2, 46):
        build_batch(long_and_short(sampler_of("train", "narrow"), 1.0), (0, 0), Shard())


def test_a_prompt_that_is_its_last_shot_is_left_alone(sampler_of):
    """Without a description its first shot is all that it has; other prompts of the row give way."""
    sampler = sampler_of("train", "narrow")
    groups = [sampler.draw(np.random.default_rng([0, 0, i])) for i in range(2)]
    shot = dataclasses.replace(groups[0].shots[0], query="red " * 24)
    alone = sampler._fit(dataclasses.replace(groups[0], description="", shots=(shot,)))
    other = next(g for i in range(99) if len((g := sampler.draw(np.random.default_rng([1, i]))).shots) > 1)
    assert len(alone.prompt) > len(other.prompt)
    sampler = copy.copy(sampler)
    room = len(alone.prompt) + len(other.prompt) - 1 + 2 * sampler.num_meta
    sampler.config = dataclasses.replace(sampler.config, cloud_length=room)
    one, two = sorted(sampler.rows([alone, other]), key=lambda g: g.description)
    assert (one.shots, len(two.shots) < len(other.shots)) == ((shot,), True)


def test_rows_that_do_not_lie_side_by_side_are_those_of_the_whole_batch(sampler_of):
    sampler, rows = sampler_of(), (0, 3, 4, 7)
    whole, found = (build_batch(sampler, (0, 0), Shard(r)) for r in (None, rows))
    np.testing.assert_array_equal(found.prompts.tokens_BT, whole.prompts.tokens_BT[list(rows)])
    prompts = [2 * row + i for row in rows for i in (0, 1)]
    np.testing.assert_array_equal(found.tokens_PT, whole.tokens_PT[prompts])


def test_a_part_of_whole_blocks_draws_no_other_prompts(sampler_of, monkeypatch):
    sampler, drawn = sampler_of(), []
    draw = type(sampler).draw
    monkeypatch.setattr(type(sampler), "draw", lambda self, rng: drawn.append(1) or draw(self, rng))
    build_batch(sampler, (0, 0), part(1, 4))
    assert len(drawn) == 4


def test_blocks_change_what_shares_a_row_and_never_what_is_drawn(sampler_of):
    small, large = (build_batch(sampler_of(rows_per_block=n), (0, 0), Shard()) for n in (2, 8))
    assert not np.array_equal(small.prompts.tokens_BT, large.prompts.tokens_BT)
    assert sorted(map(tuple, small.tokens_PT)) == sorted(map(tuple, large.tokens_PT))


def test_validation_batches_are_fixed_and_not_those_of_training(sampler_of):
    sampler = sampler_of("validation")
    once, again = (validation_batches(sampler, 2, Shard()) for _ in range(2))
    same(once, again)
    assert not np.array_equal(once[0].prompts.tokens_BT, once[1].prompts.tokens_BT)


def test_worker_processes_build_the_batches_of_the_thread(sampler_of):
    thread = TrainingBatches(sampler_of(), seed=3, steps=9, shard=part(1, 2))
    processes = TrainingBatches(sampler_of(workers=2), seed=3, steps=9, shard=part(1, 2))
    try:
        for _ in range(4):
            same(next(processes), next(thread))
        assert processes.get_state() == thread.get_state() == {"next_batch": 4}
        # From another place, and to the end.
        processes.set_state({"next_batch": 6})
        thread.set_state({"next_batch": 6})
        rest = [list(batches) for batches in (processes, thread)]
        assert len(rest[0]) == len(rest[1]) == 3
        same(*rest)
    finally:
        processes.close()
        thread.close()


def test_the_place_of_an_earlier_version_is_read_and_any_other_refused(sampler_of):
    batches = TrainingBatches(sampler_of(), 0, 9, Shard())
    batches.set_state({"next_index": 5})  # as Grain's own iterators wrote it
    expected = build_batch(sampler_of(), (0, 5), Shard())
    same(next(batches), expected)
    assert batches.get_state() == {"next_batch": 6}
    batches.close()
    with raises(CheckpointError, "state", "{'threads': 3}"):
        batches.set_state({"threads": 3})


@pytest.mark.parametrize("part", ["query", "response", "description"])
def test_a_row_of_megabytes_is_left_out_unread(sampler_of, monkeypatch, part):
    sampler = copy.copy(sampler_of())
    long = "red " * 100_000

    def text(self, text):
        assert len(text) < len(long), "it was made into tokens"
        return read(self, text)

    read = Encoder.text
    monkeypatch.setattr(Encoder, "text", text)
    if part == "description":
        sampler.tasks = [dataclasses.replace(task, descriptions=(long,)) for task in sampler.tasks]
        with raises(DataError, "data.query_length"):
            build_batch(sampler, (0, 0), Shard())
        return
    rows = [dataclasses.replace(task.train[0], **{part: long}) for task in sampler.tasks]
    tasks = zip(sampler.tasks, rows, strict=True)
    sampler.tasks = [dataclasses.replace(task, train=(row, *task.train[1:])) for task, row in tasks]
    build_batch(sampler, (0, 0), Shard())
