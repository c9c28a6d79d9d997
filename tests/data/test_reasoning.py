"""Splits of the reasoning tasks: file layouts, reserved slices, leakage, errors, and counts on the real files."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import raises

from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.reasoning import REASONING_TASKS, SEEN_TASKS, load_reasoning
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import DataError

MakeRow = Callable[[str, int], Any]


def _write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _keys(examples: Any) -> set[str]:
    return {example.query_key for example in examples}


def _assert_clean(task: Task) -> None:
    assert not _keys(task.train) & _keys(task.test)
    assert not _keys(task.train) & _keys(task.validation)
    assert not _keys(task.validation) & _keys(task.test)
    ids = [e.id for split in (task.train, task.validation, task.test) for e in split]
    assert len(ids) == len(set(ids))


def test_original_releases(release: Path) -> None:
    tasks = load_reasoning(release, REASONING_TASKS)
    assert tuple(tasks) == tuple(REASONING_TASKS)
    for name, task in tasks.items():
        _assert_clean(task)
        assert (task.name, task.source, task.seen, task.chat) == (name, name, name in SEEN_TASKS, False)
        on_test = name in ("arc_challenge", "arc_easy", "openbookqa")
        # Validation: the split of 24 where test is scored, else 5 % of the 60 training rows.
        expected = (60, 24, 30) if on_test else (57, 3, 24)
        assert (len(task.train), len(task.validation), len(task.test)) == expected, name


def test_plain_layout_and_partial_names(tmp_path: Path, make_row: MakeRow) -> None:
    _write(tmp_path / "winogrande" / "train_l.jsonl", [make_row("winogrande", i) for i in range(40)])
    _write(tmp_path / "winogrande" / "validation.jsonl", [make_row("winogrande", i) for i in range(50, 60)])
    _write(tmp_path / "piqa" / "train_partial.jsonl", [make_row("piqa", i) for i in range(40)])
    _write(tmp_path / "piqa" / "validation.jsonl", [make_row("piqa", i) for i in range(50, 60)])
    for task in load_reasoning(tmp_path, ["winogrande", "piqa"]).values():
        assert (len(task.train), len(task.validation), len(task.test)) == (38, 2, 10)


@pytest.mark.parametrize("name", ["boolq", "hellaswag"])
def test_without_a_train_split_a_fixed_slice_is_reserved(
    name: str, tmp_path: Path, make_row: MakeRow, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [make_row(name, i) for i in range(100)]
    _write(tmp_path / name / "validation.jsonl", rows)
    if name == "boolq":
        bare = [{**make_row(name, i), "passage": None} for i in range(200, 220)]
        _write(tmp_path / name / "train_nopassage.jsonl", bare)
    with caplog.at_level(logging.INFO):
        task = load_reasoning(tmp_path, [name], reserve=40)[name]
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 60)
    _assert_clean(task)
    assert "40 of 100 scored rows are reserved" in caplog.text
    assert "the other 60" in caplog.text
    # The slice goes by content, so the order of the file does not matter; it never exceeds half.
    _write(tmp_path / name / "validation.jsonl", rows[::-1])
    again = load_reasoning(tmp_path, [name], reserve=40)[name]
    assert _keys(again.test) == _keys(task.test)
    assert _keys(again.validation) == _keys(task.validation)
    assert len(load_reasoning(tmp_path, [name], reserve=1000)[name].test) == 50


def test_rows_that_are_scored_leave_train_and_validation(tmp_path: Path, make_row: MakeRow) -> None:
    def arc(i: int, **change: Any) -> Any:
        return {**make_row("arc_easy", i), **change}

    shouting = arc(31, id="copy")
    shouting["question"]["stem"] = shouting["question"]["stem"].upper().replace("?", " ?!")
    _write(tmp_path / "arc_easy" / "train.jsonl", [arc(i) for i in range(10)] + [shouting, arc(21), arc(41)])
    _write(tmp_path / "arc_easy" / "validation.jsonl", [arc(i) for i in range(20, 25)] + [arc(32)])
    _write(tmp_path / "arc_easy" / "test.jsonl", [arc(i) for i in range(30, 35)])
    task = load_reasoning(tmp_path, ["arc_easy"])["arc_easy"]
    # Gone: a rewording by case and punctuation of test row 31, validation row 21, and test row 32 from validation.
    assert (len(task.train), len(task.validation), len(task.test)) == (11, 5, 5)
    # Row 41 is scored in the sister task.
    _write(tmp_path / "arc_challenge" / "test.jsonl", [arc(41)])
    assert len(load_reasoning(tmp_path, ["arc_easy"])["arc_easy"].train) == 10


def test_without_train_the_free_validation_rows_serve(tmp_path: Path, make_row: MakeRow) -> None:
    _write(tmp_path / "openbookqa" / "dev.jsonl", [make_row("openbookqa", i) for i in range(40)])
    _write(tmp_path / "openbookqa" / "test.jsonl", [make_row("openbookqa", i) for i in range(50, 60)])
    task = load_reasoning(tmp_path, ["openbookqa"])["openbookqa"]
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 10)


def test_repeated_and_missing_ids_stay_distinct(tmp_path: Path, make_row: MakeRow) -> None:
    rows = [{**make_row("piqa", i), "id": "same" if i % 2 else None} for i in range(40)]
    _write(tmp_path / "piqa" / "train.jsonl", rows)
    _write(tmp_path / "piqa" / "dev.jsonl", [make_row("piqa", i) for i in range(50, 60)])
    _assert_clean(load_reasoning(tmp_path, ["piqa"])["piqa"])


def test_errors_name_what_is_wrong(tmp_path: Path, make_row: MakeRow) -> None:
    with raises(DataError, "data.dir", tmp_path / "no_such", "--data.dir", code="missing"):
        load_reasoning(tmp_path / "no_such", ["piqa"])
    with raises(DataError, "data.dir", "validation", "'piqa'", "--data.dir", code="no split"):
        load_reasoning(tmp_path, ["piqa"])
    with raises(DataError, "data.tasks", "'pica'"):
        load_reasoning(tmp_path, ["pica"])
    path = tmp_path / "piqa" / "dev.jsonl"
    _write(path, [make_row("piqa", 0), {"goal": "x", "sol1": "y", "label": 0}])
    with raises(DataError, "dev.jsonl:2:sol2", f"{path}:2", code="missing"):
        load_reasoning(tmp_path, ["piqa"])
    _write(path, [{**make_row("piqa", 0), "label": 5}])
    with raises(DataError, "dev.jsonl:1", f"{path}:1", 6, 2, code="malformed"):
        load_reasoning(tmp_path, ["piqa"])
    _write(path, [{"goal": "x", "sol1": "y", "sol2": "z"}] * 2)
    path.with_name("dev-labels.lst").write_text("0\n1\n0\n")
    with raises(DataError, "dev-labels.lst", "3 labels", "2 rows"):
        load_reasoning(tmp_path, ["piqa"])


def test_load_tasks(release: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.jsonl"
    own.write_text(json.dumps({"system": "Translate.", "input": "chat", "output": "cat"}))
    tasks = load_tasks(["piqa", "arc_easy", "piqa"], release, files=[own])
    assert list(tasks) == ["piqa", "arc_easy", "mine"]
    assert list(load_tasks([], files=[own])) == ["mine"]
    with raises(DataError, "data.tasks", "'arc-easy'", "'arc_easy'"):
        load_tasks(["arc-easy"], release)
    with raises(DataError, "data.dir", tmp_path / "nowhere", code="missing"):
        load_tasks(["piqa"], tmp_path / "nowhere")
    clash = tmp_path / "piqa.jsonl"
    clash.write_text(own.read_text())
    with raises(DataError, "data.files", clash, "'piqa'", code="taken"):
        load_tasks(["piqa"], release, files=[clash])


def test_counts_of_the_published_files() -> None:
    directory = os.environ.get("LORA_GEN_DATA")
    if not directory:
        pytest.skip("LORA_GEN_DATA names no directory with the data sets")
    tasks = load_reasoning(directory, REASONING_TASKS)
    for task in tasks.values():
        _assert_clean(task)
        assert all(e.options[e.gold] == e.response for e in (*task.train, *task.test))
    test = {name: len(task.test) for name, task in tasks.items()}
    published = {"arc_challenge": 1172, "arc_easy": 2376, "openbookqa": 500, "social_iqa": 1954, "winogrande": 1267}
    assert published.items() <= test.items()
    assert test["piqa"] == 1838
    for name, total in (("boolq", 3270), ("hellaswag", 10042)):
        task = tasks[name]
        assert test[name] == total or test[name] + len(task.train) + len(task.validation) == total
