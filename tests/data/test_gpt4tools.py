"""GPT4Tools' schema: rows into tasks and training records, and what is wrong with a row."""

import json

import pytest
from helpers import raises

from lora_gen_jax.data.gpt4tools import generated_records, load_gpt4tools, training_records
from lora_gen_jax.data.pocket.agent import agent_tasks
from lora_gen_jax.data.records import load_records
from lora_gen_jax.errors import DataError

CLOUD = "You help.\nTOOLS:\n> {}: does something.\nWrite Thought, Action, Action Input."
EDGE = "Previous conversation:\nHuman: hello\nAI: hello\nNew input: {}\nNow go on."
OUTPUT = "Thought: Do I need to use a tool? Yes\nAction: {}\nAction Input: a\nObservation:"


def row(tool, request, **more):
    instruction = CLOUD.format(tool) + "\n\n" + EDGE.format(request)
    return {"instruction": instruction, "input": "", "output": OUTPUT.format(tool), **more}


@pytest.fixture
def write(tmp_path):
    def written(rows, name="rows.json", lines=False):
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return written


@pytest.mark.parametrize("lines", [False, True])
def test_rows_with_the_same_cloud_part_are_one_task(write, lines):
    path = write([row("Draw", "a"), row("Blur", "b", id=7), row("Draw", "c")], lines=lines)
    draw, blur = load_gpt4tools([path], seen=False)
    assert draw.descriptions == (CLOUD.format("Draw"),)
    assert [(e.query, e.response) for e in draw.test] == [(EDGE.format(x), OUTPUT.format("Draw")) for x in "ac"]
    assert [e.id for e in (*draw.test, *blur.test)] == ["rows/0", "rows/2", "rows/7"]
    assert (draw.seen, draw.train, draw.validation) == (False, (), ())
    assert draw.name != blur.name
    assert [task.seen for task in load_gpt4tools([path], seen=True)] == [True, True]


def test_tasks_go_on_over_files_and_names_do_not_depend_on_the_order(write):
    first, second = write([row("Draw", "a")], "one.json"), write([row("Blur", "b"), row("Draw", "c")], "two.json")
    names = [
        {task.name: len(task.test) for task in load_gpt4tools(files, True)}
        for files in ([first, second], [second, first])
    ]
    assert names[0] == names[1]
    assert sorted(names[0].values()) == [1, 2]


def test_training_rows_are_tasks_of_the_users_own(write, tmp_path):
    rows = [row("Draw", f"thing {i}") for i in range(150)] + [row("Blur", "b")]
    (tmp_path / "train.jsonl").write_text(training_records([write(rows)]))
    tasks = {task.descriptions[0]: task for task in load_records(tmp_path / "train.jsonl")}
    draw = tasks[CLOUD.format("Draw")]
    assert not draw.test
    assert 1 <= len(draw.validation) <= 8
    assert len(draw.train) + len(draw.validation) == 150
    assert draw.train[0].response == OUTPUT.format("Draw")
    assert len(tasks[CLOUD.format("Blur")].train) == 1


BAD = [
    (
        {"instruction": "no such line", "input": "", "output": "x"},
        "instruction",
        "no marker",
        '"Previous conversation:"',
    ),
    ({"instruction": EDGE, "input": "", "output": "x"}, "instruction", "no tools", '"Previous conversation:"'),
    ({"instruction": CLOUD + "\n" + EDGE, "input": "more", "output": "x"}, "input", None, '"input"'),
    ({"instruction": CLOUD + "\n" + EDGE, "input": ""}, "output", "text", '"output"'),
    ({"instruction": 3, "output": "x"}, "instruction", "text", '"instruction"'),
    (row("Draw", "b", id=0), "id", "taken", "'rows/0'"),
]


@pytest.mark.parametrize(("bad", "field", "code", "fact"), BAD)
def test_a_bad_row_is_named(write, bad, field, code, fact):
    path = write([row("Draw", "a", id=0), bad], lines=True)
    for read in (lambda p: load_gpt4tools(p, seen=True), training_records):
        with raises(DataError, f"rows.json:2:{field}", f"{path}:2", "row 2", fact, code=code):
            read([path])


def test_generated_rows_train_on_seen_tools_alone_and_on_no_scored_request(tmp_path):
    (tmp_path / "rows.jsonl").write_text(generated_records(30))
    tasks = load_records(tmp_path / "rows.jsonl")
    seen = [task for task in agent_tasks() if task.seen]
    assert len(tasks) == len(seen) == 60
    for task, own in zip(tasks, seen, strict=True):
        assert set(task.descriptions) == set(own.descriptions)
        assert (len(task.train), len(task.validation), len(task.test)) == (30, 4, 0)
        assert {e.query_key for e in own.train} <= {e.query_key for e in task.train}
    asked = {e.query.split("New input:")[1] for task in tasks for e in task.train}
    scored = {e.query.split("New input:")[1] for task in agent_tasks() for e in task.test}
    assert not asked & scored
