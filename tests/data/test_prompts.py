"""Shots never hold the query, are the same in every process, and prompts have the documented layout."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import raises
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_gen_jax.data.prompts import evaluation_shots, few_shot_context, sample_shots, separator, system_prompt
from lora_gen_jax.data.tasks import Example, Task, hash_slice, normalize
from lora_gen_jax.errors import DataError

# Few letters in two cases with and without punctuation, so that equal queries in different dress are common.
_QUERIES = st.lists(st.text("aAb .?", min_size=1, max_size=4), min_size=1, max_size=24)


def _task(train: list[str], test: list[str] | None = None) -> Task:
    rows = tuple(Example(f"t{i}", query, f" r{i}") for i, query in enumerate(train))
    scored = tuple(Example(f"s{i}", query, " r") for i, query in enumerate(test or []))
    return Task("toy", ("Do it.",), rows, scored, source="toy")


@settings(deadline=None)
@given(_QUERIES, st.integers(0, 8), st.integers(0, 2**32 - 1), st.data())
def test_sampled_shots_never_hold_a_query(queries: list[str], k: int, seed: int, data: st.DataObject) -> None:
    task = _task(queries)
    asked = data.draw(st.lists(st.sampled_from(task.train), max_size=4))
    shots = sample_shots(task, k, np.random.default_rng(seed), asked)
    forbidden = {normalize(e.query) for e in asked}
    assert not forbidden & {normalize(shot.query) for shot in shots}
    assert len({shot.id for shot in shots}) == len(shots)
    assert set(shots) <= set(task.train)
    free = [e for e in task.train if normalize(e.query) not in forbidden]
    assert len(shots) == min(k, len(free))


@settings(deadline=None)
@given(_QUERIES, _QUERIES, st.integers(0, 8), st.integers(0, 5))
def test_evaluation_shots_never_hold_a_scored_query(train: list[str], test: list[str], k: int, seed: int) -> None:
    task = _task(train, test)
    shots = evaluation_shots(task, k, seed)
    keys = [normalize(shot.query) for shot in shots]
    assert not set(keys) & {normalize(e.query) for e in task.test}
    assert len(set(keys)) == len(keys)
    assert len(keys) == min(k, len({normalize(q) for q in train} - {normalize(q) for q in test}))
    # Nested, and indifferent to the order of the rows.
    assert shots[: k // 2] == evaluation_shots(task, k // 2, seed)
    turned = Task("toy", ("Do it.",), task.train[::-1], task.test, source="toy")
    assert [normalize(shot.query) for shot in evaluation_shots(turned, k, seed)] == keys


def test_rows_of_the_same_id_are_told_apart() -> None:
    """rows.json and rows.jsonl number theirs alike, and may be one task."""
    rows = tuple(Example(f"t{i % 4}", f"q{i}", "r") for i in range(8))
    task, rng = Task("toy", ("Do it.",), rows, (), source="toy"), np.random.default_rng(0)
    for _ in range(50):
        assert rows[1] not in sample_shots(task, 7, rng, [rows[1]])


def test_sampling_is_even() -> None:
    task = _task([f"q{i}" for i in range(6)])
    rng = np.random.default_rng(3)
    counts = np.zeros(6)
    for _ in range(3000):
        for shot in sample_shots(task, 2, rng, task.train[:1]):
            counts[int(shot.id[1:])] += 1
    assert counts[0] == 0
    # Each of the five is drawn with chance 2/5: 1200 times, standard deviation 27.
    assert np.all(np.abs(counts[1:] - 1200) < 120)


def test_evaluation_shots_depend_on_seed_and_name() -> None:
    train = [f"q{i}" for i in range(50)]
    first = evaluation_shots(_task(train), 5, 0)
    assert first != evaluation_shots(_task(train), 5, 1)
    other = Task("other", ("Do it.",), _task(train).train, (), source="toy")
    assert first != evaluation_shots(other, 5, 0)


def test_choices_are_the_same_in_other_processes() -> None:
    program = (
        "from lora_gen_jax.data.prompts import evaluation_shots\n"
        "from lora_gen_jax.data.tasks import Example, Task, hash_slice\n"
        "rows = tuple(Example(f't{i}', f'q{i}', f' r{i}') for i in range(50))\n"
        "task = Task('toy', ('Do it.',), rows, (), source='toy')\n"
        "print([s.id for s in evaluation_shots(task, 5, 7)], [e.id for e in hash_slice(rows, 6, 'x')[0]])\n"
    )
    task = _task([f"q{i}" for i in range(50)])
    expected = [s.id for s in evaluation_shots(task, 5, 7)], [e.id for e in hash_slice(task.train, 6, "x")[0]]
    for hash_seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
        )
        assert result.stdout.strip() == f"{expected[0]} {expected[1]}"


def test_layout() -> None:
    shots = (Example("1", "Question: 1+1?\nAnswer:", " two"), Example("2", "Question: 2+2?\nAnswer:", " four"))
    text = "Add.\n\nQuestion: 1+1?\nAnswer: two\n\nQuestion: 2+2?\nAnswer: four"
    assert system_prompt("Add.", shots) == text
    assert system_prompt("", shots) == text.removeprefix("Add.\n\n")
    assert system_prompt("Add.\n") == "Add."
    assert few_shot_context("Add.", shots, "Question: 3?\nAnswer:") == text + "\n\nQuestion: 3?\nAnswer:"
    assert few_shot_context("", (), "Question: 3?\nAnswer:") == "Question: 3?\nAnswer:"
    assert system_prompt("Translate.", [Example("1", "chat", "cat")]) == "Translate.\n\nchat\ncat"
    assert [separator("a", " b"), separator("a ", "b"), separator("a", "b"), separator("a", "")] == ["", "", "\n", ""]


@pytest.mark.parametrize("description", ["", " \n\t"])
def test_empty_prompts_are_refused(description: str) -> None:
    with raises(DataError, "description"):
        system_prompt(description)
    with raises(DataError, "query"):
        few_shot_context("Add.", (), description)
    with raises(DataError, "k", "-1"):
        sample_shots(_task(["a"]), -1, np.random.default_rng(0))


def test_normalize_keeps_operators() -> None:
    assert normalize("  What's  2 + 3?") == normalize("what's 2 +  3")
    assert normalize("2 + 3") != normalize("2 - 3")
    assert normalize("?!") == "?!"
