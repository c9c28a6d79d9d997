"""Function-calling rows: what the cloud reads, what the edge reads, and one right answer."""

import json

import pytest
from helpers import raises

from lora_gen_jax.data.function_calls import NO_CALL, function_text, load_function_calls, render
from lora_gen_jax.errors import DataError
from lora_gen_jax.lab.agent.function_calls import parse_calls, score_calls

PAINT = {
    "name": "wall.paint",
    "description": "Paints a wall.",
    "parameters": {
        "type": "dict",
        "properties": {
            "color": {"type": "string", "description": "Which color.", "enum": ["red", "blue"]},
            "spots": {
                "type": "array",
                "description": "Where.",
                "items": {"type": "dict", "properties": {"x": {"type": "float", "description": "Left."}}},
            },
        },
        "required": ["color"],
    },
}
GOLD = [{"wall.paint": {"color": ["Red", "dark red"], "spots": [[{"x": [1.5], "size": ["", 2]}]], "coats": [2, ""]}}]


def row(turn, gold, name="a"):
    return {"id": name, "question": [turn], "function": [PAINT], "ground_truth": gold}


def says(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def write(tmp_path):
    def written(rows, name="bfcl_simple.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return tmp_path / name

    return written


def test_a_function_as_the_cloud_reads_it():
    assert function_text(PAINT).split("\n") == [
        "> wall.paint: Paints a wall.",
        "  color (string): Which color. One of red, blue.",
        "  spots (array of dict, optional): Where.",
        "    x (float, optional): Left.",
    ]
    assert function_text({"name": "stop"}) == "> stop: "


def test_the_edge_reads_the_question_and_the_cloud_all_else(write):
    turn = [says("system", "Be brief."), says("user", "hi"), says("assistant", "yes?"), says("user", "paint it red")]
    (found,) = load_function_calls([write([row(turn, GOLD)])])
    (example,) = found.task.test
    assert example.query == "User: hi\nAssistant: yes?\nUser: paint it red\nCalls:"
    (description,) = found.task.descriptions
    assert "\nBe brief.\nFUNCTIONS:\n> wall.paint: " in description
    assert "name(argument=value, other_argument=value)" in description
    assert "paint it red" not in description
    assert (found.category, found.task.seen, found.task.train) == ("simple", False, ())


def test_the_answer_that_is_written_out_is_right_by_the_scorer(write):
    rows = [row([says("user", "x")], GOLD * 2, "a"), row([says("user", "y")], [], "b")]
    two, none = load_function_calls([write(rows)])
    assert two.task.test[0].response == "\n".join(['wall.paint(color="Red", spots=[{"x": 1.5}])'] * 2)
    assert none.task.test[0].response == NO_CALL
    for found in (two, none):
        assert score_calls(parse_calls(found.task.test[0].response), found.gold).exact == 1
    assert render("f", {"a": ['say "x"\\'], "b": [None], "c": [True, ""]}) == 'f(a="say \\"x\\"\\\\", b=None)'


def test_files_directories_and_limits(write, tmp_path):
    write([row([says("user", str(i))], []) for i in range(3)], "bfcl_irrelevance.jsonl")
    write([row([says("user", str(i))], GOLD) for i in range(3)], "bfcl_live_simple.jsonl")
    write([], "other.jsonl")
    found = load_function_calls([tmp_path], limit=2)
    assert [one.category for one in found] == ["irrelevance"] * 2 + ["live_simple"] * 2
    (tmp_path / "empty").mkdir()
    with raises(DataError, "--bfcl", tmp_path / "empty"):
        load_function_calls([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"id": "a", "question": [[says("user", "x")]], "function": []}, ":ground_truth"),
        (row([says("assistant", "x")], []), ":question"),
        (row([says("user", "x")], [{"f": {"a": 3}}]), ":ground_truth.f.a"),
        ({**row([], []), "question": []}, ""),
    ],
)
def test_a_bad_row_is_named(write, bad, key):
    with raises(DataError, f"bfcl_simple.jsonl:2{key}"):
        load_function_calls([write([row([says("user", "x")], []), bad])])
