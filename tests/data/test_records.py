"""The user's own files: every accepted form, grouping, splits, and every error with its file and line."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import raises

from lora_gen_jax.data.records import GENERIC_SYSTEM, load_records
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import DataError


def _load(path: Path, *rows: Any) -> list[Task]:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return load_records(path)


def _plain(query: str, output: str = "out", **more: Any) -> dict[str, Any]:
    return {"system": "Translate to English.", "input": query, "output": output, **more}


def _turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    order = roles[:1] + ["user", "assistant"] * len(contents) if first == "system" else roles * len(contents)
    return [{"role": role, "content": text} for role, text in zip(order, contents, strict=False)]


def test_system_input_output(tmp_path: Path) -> None:
    (task,) = _load(tmp_path / "french.jsonl", _plain("chat", "cat"), _plain("naïve\u2028ligne", "naive", other=1))
    assert (task.name, task.source, task.chat, task.seen) == ("french", "french", False, True)
    assert task.descriptions == ("Translate to English.",)
    assert [(e.query, e.response) for e in task.train] == [("chat", "cat"), ("naïve\u2028ligne", "naive")]
    assert task.train[0].options == ()
    assert not task.test


def test_messages(tmp_path: Path) -> None:
    long = _turns("Be brief.", "Hi", "Hello", "Bye", "Farewell", first="system")
    tasks = _load(
        tmp_path / "talk.jsonl",
        {"messages": _turns("Be brief.", "Hi", "Hello", first="system")},
        {"messages": long},
        {"messages": _turns("One?", "Two.")},
        {"messages": [{"role": "system", "content": ""}, *_turns("Three?", "Four.")]},
    )
    brief, generic = tasks
    assert brief.chat
    assert generic.chat
    assert (brief.descriptions, generic.descriptions) == (("Be brief.",), (GENERIC_SYSTEM,))
    assert [(e.query, e.response) for e in brief.train] == [
        ("Hi", "Hello"),
        ("User: Hi\nAssistant: Hello\nUser: Bye", "Farewell"),
    ]
    assert len(generic.train) == 2
    assert len({brief.name, generic.name, "talk"}) == 3
    assert brief.name.startswith("talk/")
    assert [e.turns for e in brief.train] == [(), (("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))]


def test_a_system_text_beside_messages_or_an_instruction(tmp_path: Path) -> None:
    beside, first = _turns("Hi", "Hello"), _turns("Be brief.", "Hi", "Hello", first="system")
    (chat,) = _load(tmp_path / "c.jsonl", {"system": "Be brief.", "messages": beside}, {"messages": first})
    assert chat.descriptions == ("Be brief.",)
    (generic,) = _load(tmp_path / "g.jsonl", {"system": "", "messages": beside})
    assert generic.descriptions == (GENERIC_SYSTEM,)
    with raises(DataError, "t.jsonl:1:system", code="repeated"):
        _load(tmp_path / "t.jsonl", {"system": "Be rude.", "messages": first})
    asked = {"system": "You are a poet.", "instruction": "Name a colour.", "output": "Red"}
    (poet,) = _load(tmp_path / "p.jsonl", asked)
    assert (poet.descriptions, poet.train[0].query) == (("You are a poet.",), "Name a colour.")
    (given,) = _load(tmp_path / "i.jsonl", asked | {"input": "of the sea"})
    assert given.descriptions == ("You are a poet.\n\nName a colour.",)
    assert given.train[0].query == "of the sea"


def test_alpaca_rows(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Count the words.", "input": "a b", "output": "2"},
        {"instruction": "Name a colour.", "input": "", "output": "Red"},
        {"instruction": "Count the words.", "input": "a b c", "output": "3"},
        {"instruction": "Name a fish.", "output": "Cod"},
    ]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows, indent=2))
    counting, generic = load_records(path)
    assert counting.descriptions == ("Count the words.",)
    assert [e.query for e in counting.train] == ["a b", "a b c"]
    assert generic.descriptions == (GENERIC_SYSTEM,)
    assert [(e.query, e.response) for e in generic.train] == [("Name a colour.", "Red"), ("Name a fish.", "Cod")]


def test_alpaca_rows_without_an_answer_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = {"instruction": "Draw a cat.", "input": "", "output": " "}
    (task,) = _load(tmp_path / "a.jsonl", empty, {"instruction": "Name a fish.", "output": "Cod"})
    assert [e.response for e in task.train] == ["Cod"]
    assert '1 rows with an "instruction" have an empty "output" and are left out' in caplog.text
    with raises(DataError, "data.files", tmp_path / "b.jsonl", code="no rows"):
        _load(tmp_path / "b.jsonl", empty)


def test_multiple_choice(tmp_path: Path) -> None:
    options = ["red", "green"]
    row = {"system": "Say.", "input": "Grass is", "options": options}
    (task,) = _load(
        tmp_path / "mc.jsonl",
        {**row, "gold": 1},
        {**row, "answer": "green"},
        {**row, "answer": "B"},
        {**row, "answer": 1, "output": "green"},
    )
    for example in task.train:
        assert (example.options, example.gold, example.response) == ((" red", " green"), 1, " green")
        assert example.option_lengths == (3, 5)
    (chat,) = _load(tmp_path / "c.jsonl", {"messages": _turns("Grass is"), "options": options, "gold": 0})
    assert chat.train[0].options == ("red", "green")


def test_task_field_groups_rows_over_files(tmp_path: Path) -> None:
    second = {"system": "Into English:", "input": "chien", "output": "dog", "task": "fr-en"}
    (tmp_path / "a.jsonl").write_text(json.dumps(_plain("chat", task="fr-en")) + "\n" + json.dumps(_plain("x")))
    (tmp_path / "b.json").write_text(json.dumps([second]))
    (tmp_path / "notes.txt").write_text("not data")
    grouped, rest = load_records(tmp_path)
    assert (grouped.name, grouped.source) == ("fr-en", "a")
    assert grouped.descriptions == ("Translate to English.", "Into English:")
    assert [e.query for e in grouped.train] == ["chat", "chien"]
    assert rest.name == "a"


def test_split_field(tmp_path: Path) -> None:
    rows = [_plain(f"q{i}", split=split) for i, split in enumerate(["train", "validation", "test"] * 10)]
    (task,) = _load(tmp_path / "t.jsonl", *rows, _plain("Q2!", split="train"))
    # The last row is test row 2 in other dress.
    assert (len(task.train), len(task.validation), len(task.test)) == (10, 10, 10)


def test_hash_split(tmp_path: Path) -> None:
    small = _load(tmp_path / "small.jsonl", *[_plain(f"q{i}") for i in range(19)])[0]
    assert (len(small.train), len(small.validation), len(small.test)) == (19, 0, 0)
    least = _load(tmp_path / "least.jsonl", *[_plain(f"q{i}") for i in range(20)])[0]
    assert least.test
    assert least.validation
    rows = [_plain(f"q{i}") for i in range(2000)]
    task = _load(tmp_path / "big.jsonl", *rows)[0]
    assert 60 < len(task.test) < 140
    assert 60 < len(task.validation) < 140
    assert len(task.train) + len(task.validation) + len(task.test) == 2000
    # Rows added later move no other row, nor does their order, nor a second system text, which changes the name.
    other = {"system": "Translate to French.", "input": "cat", "output": "chat"}
    grown = _load(tmp_path / "big.jsonl", *[_plain(f"p{i}") for i in range(500)], *rows[::-1], other)[0]
    assert grown.name != task.name
    assert {e.query for e in task.test} == {e.query for e in grown.test} & {row["input"] for row in rows}


def test_hash_split_of_queries_that_repeat(tmp_path: Path) -> None:
    (task,) = _load(tmp_path / "same.jsonl", *[_plain("a joke", f"joke {i}") for i in range(40)])
    assert (len(task.train), len(task.validation), len(task.test)) == (40, 0, 0)
    # A large part of a task is never held out, whatever its hash.
    for name in range(40):
        common = [_plain(f"again {name}", f"{i}") for i in range(100)]
        (task,) = _load(tmp_path / "many.jsonl", *common, *[_plain(f"q{i}") for i in range(30)])
        assert len(task.train) >= 100
        assert task.test
        assert task.validation


def test_fifty_thousand_distinct_instructions(tmp_path: Path) -> None:
    rows = ({"instruction": f"Do {i}.", "input": f"on {i}", "output": "done"} for i in range(50_000))
    path = tmp_path / "alpaca.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    start = time.process_time()
    tasks = load_records(path)
    # Far above what it takes: it catches a quadratic grouping, not a slow machine.
    assert time.process_time() - start < 30
    assert len(tasks) == 50_000
    assert len({task.name for task in tasks}) == 50_000


_GOOD = json.dumps(_plain("fine"))


def test_null_is_as_good_as_leaving_a_field_out(tmp_path: Path) -> None:
    """Tables that hold rows of several forms are written with nulls in the columns that a row has not."""
    names = ("id", "task", "split", "messages", "instruction", "system", "input", "output", "options", "gold", "answer")
    rows = [
        _plain("chat", "cat"),
        {"system": "Translate to English.", "input": "chien", "options": ["a", "b"], "gold": 0},
        {"instruction": "Say hello.", "output": "Hello."},
        {"messages": _turns("Hi", "Hello")},
    ]

    def loaded(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (tmp_path / name).mkdir()
        path = tmp_path / name / "mine.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [dataclasses.asdict(task) for task in load_records(path)]

    assert loaded("nulls", [dict.fromkeys(names) | row for row in rows]) == loaded("plain", rows)


@pytest.mark.parametrize(
    ("line", "field", "code", "facts"),
    [
        ("{oops", "", "json", ()),
        ("[" * 100_000, "", "json", ()),
        ('"text"', "", "type", ("string",)),
        ("null", "", "type", ("null",)),
        ({"text": "x"}, "system", "form", ('"messages"', '"instruction"')),
        ({"input": "x", "output": "y"}, "system", "missing", ()),
        ({"system": "s", "output": "y"}, "input", "missing", ()),
        ({"system": "s", "input": "x"}, "output", "missing", ()),
        ({"instruction": "s", "input": ["x"], "output": "y"}, "input", "type", ("list",)),
        (_plain("x", output=3), "output", "type", ("int",)),  # type: ignore[arg-type]
        (_plain("x", output=" \n"), "output", "empty", ()),
        (_plain(" "), "input", "empty", ()),
        ({**_plain("x"), "system": ""}, "system", "empty", ()),
        (_plain("x", split="dev"), "split", None, ("'dev'", "validation")),
        (_plain("x", task=5), "task", "type", ("int",)),
        ({"messages": []}, "messages", "type", ()),
        ({"messages": ["hi"]}, "messages.0", "type", ()),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "unknown", ("'robot'",)),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing", ()),
        ({"messages": _turns("only a question")}, "messages", "no response", ()),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "no query", ()),
        ({"messages": _turns("a", "b", "c")}, "messages", "order", ()),
        ({"messages": [*_turns("a"), {"role": "system", "content": "s"}]}, "messages.1.role", "order", ()),
        ({"system": "s", "input": "x", "options": ["a", "b"]}, "gold", "missing", ('"answer"',)),
        ({"system": "s", "input": "x", "options": ["a", "b"], "gold": 2}, "gold", "range", ("2 options",)),
        ({"system": "s", "input": "x", "options": ["a", "b"], "gold": True}, "gold", "range", ("True",)),
        ({"system": "s", "input": "x", "options": ["a", "b"], "answer": "c"}, "answer", "range", ("'c'",)),
        ({"system": "s", "input": "x", "options": ["a"], "gold": 0}, "options", "type", ()),
        ({"system": "s", "input": "x", "options": ["a", "a"], "gold": 0}, "options", "repeated", ()),
        ({"system": "s", "input": "x", "options": ["a", ""], "gold": 0}, "options", "empty", ()),
        ({"system": "s", "input": "x", "options": ["a", "b"], "gold": 0, "output": "b"}, "output", "mismatch", ()),
        (r'{"system": "s", "input": "\ud800", "output": "y"}', "input", "surrogate", ()),
    ],
)
def test_malformed_rows(tmp_path: Path, line: Any, field: str, code: str | None, facts: tuple[str, ...]) -> None:
    path = tmp_path / "mine.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{_GOOD}\n\n{text}\n{_GOOD}\n")
    with raises(DataError, f"mine.jsonl:3:{field}".rstrip(":"), *facts, code=code) as error:
        load_records(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_malformed_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(_GOOD.encode() + b"\n" + '{"system": "é"}'.encode("latin-1"))
    with raises(DataError, "mine.jsonl:2", f"{path}:2", code="encoding"):
        load_records(path)
    path.write_text(" \n")
    with raises(DataError, "mine.jsonl", path, code="empty"):
        load_records(path)
    with raises(DataError, "data.files", tmp_path / "none.jsonl", code="missing"):
        load_records(tmp_path / "none.jsonl")
    folder = tmp_path / "folder"
    folder.mkdir()
    with raises(DataError, "data.files", folder, code="empty"):
        load_records(folder)
    (folder / "a.jsonl").write_text(json.dumps(_plain("x", task="t")))
    (folder / "b.jsonl").write_text(json.dumps({"messages": _turns("a", "b"), "task": "t"}))
    with raises(DataError, "b.jsonl:1:task", "'t'", code="mixed"):
        load_records(folder)
    (folder / "b.jsonl").write_text(json.dumps(_plain("y", task="c")))
    (folder / "c.jsonl").write_text(_GOOD)
    with raises(DataError, "data.files", "'c'", code="taken"):
        load_records(folder)
    path.write_text("\n".join([json.dumps(_plain("x", id=1)), json.dumps(_plain("y", id=1))]))
    with raises(DataError, "mine.jsonl:2:id", 1, code="taken"):
        load_records(path)


@pytest.mark.parametrize(
    ("text", "field", "code"),
    [
        ("[\n\n%s\n", "mine.json:4", "json"),
        ("[%s,\n]", "mine.json:2", "json"),
        ("[%s,\n%s\n7]", "mine.json:3", "json"),
        ("[\n%s,\n7]", "mine.json:3", "type"),
        ("[%s] more", "mine.json:1", "json"),
        ("[]", "mine.json", "empty"),
    ],
)
def test_malformed_arrays(tmp_path: Path, text: str, field: str, code: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text.replace("%s", _GOOD))
    with raises(DataError, field, path, code=code):
        load_records(path)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{_GOOD}\r\n{_GOOD}\r\n".encode())
    assert len(load_records(path)[0].train) == 2
