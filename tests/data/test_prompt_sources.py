"""From conversations, examples and files of many prompts to system prompts; every mistake is named where it stands."""

import json

import pytest
from helpers import raises, write_rows

from lora_gen_jax.data.prompt_sources import chat_prompt, prompt_of, read_chat, read_prompts, read_shots
from lora_gen_jax.data.prompts import system_prompt
from lora_gen_jax.data.record_rows import GENERIC_SYSTEM
from lora_gen_jax.data.records import load_records
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.errors import DataError


def system(text):
    return {"role": "system", "content": text}


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CHAT = [system("Name the young."), *turns("cow", "calf", "owl", "owlet")]
TEXT = "Name the young.\n\ncow\ncalf\n\nowl\nowlet"


def test_a_conversation_becomes_its_system_text_and_shots():
    assert chat_prompt(CHAT) == TEXT
    assert chat_prompt([system("Be brief.")]) == "Be brief."


def test_a_conversation_reads_as_the_records_of_training_do(tmp_path):
    """The same messages, as rows of a training file, with and without a system text."""
    for first in ([system("Name the young.")], [], [system("")]):
        rows = [{"messages": [*first, *turns(*pair)]} for pair in (("cow", "calf"), ("owl", "owlet"))]
        (task,) = load_records(write_rows(tmp_path / "rows.jsonl", rows))
        (description,) = task.descriptions
        shots = sorted(task.train, key=lambda example: example.query)
        assert chat_prompt([*first, *turns("cow", "calf", "owl", "owlet")]) == system_prompt(description, shots)


def test_a_conversation_without_a_system_text_gets_the_generic_one():
    assert chat_prompt(turns("cow", "calf")) == f"{GENERIC_SYSTEM}\n\ncow\ncalf"


@pytest.mark.parametrize(
    ("messages", "field", "code", "facts"),
    [
        ([], "messages", "type", ()),
        ("hello", "messages", "type", ()),
        ({}, "messages", "type", ()),
        ([1], "messages.0", "type", ("message 1",)),
        ([{"role": "tool", "content": "x"}], "messages.0.role", "unknown", ("message 1", "'tool'")),
        ([{"role": ["user"], "content": "x"}], "messages.0.role", "unknown", ("message 1",)),
        ([{"role": "user"}], "messages.0.content", "missing", ("message 1",)),
        ([system("x"), {"role": "user", "content": 3}], "messages.1.content", "type", ("message 2", "int")),
        ([{"role": "user", "content": None}], "messages.0.content", "type", ("message 1", "NoneType")),
        ([system("x"), {"role": "user", "content": " "}], "messages.1.content", "empty", ("message 2",)),
        ([{"role": "user", "content": "\ud800"}], "messages.0.content", "surrogate", ("message 1",)),
        ([*turns("a", "b"), system("x")], "messages.2.role", "order", ("message 3", '"system"')),
        ([*turns("a", "b", "c")], "messages.2", "unanswered", ("message 3",)),
        ([system("x"), *turns("a")], "messages.1", "unanswered", ("message 2", "generate --input")),
        ([*turns("a"), *turns("b")], "messages.1.role", "turn", ("message 2", '"user"', '"assistant"')),
        ([turns("a", "b")[1]], "messages.0.role", "turn", ("message 1", '"assistant"', '"user"')),
        ([system("")], "messages", "empty", ()),
    ],
)
def test_a_conversation_that_is_no_prompt_is_refused(messages, field, code, facts):
    with raises(DataError, field, *facts, code=code):
        chat_prompt(messages)


def test_shots_become_a_prompt_with_a_description_or_without():
    shots = [{"input": "cow", "output": "calf"}, {"query": "owl", "response": "owlet", "id": 7}]
    assert prompt_of({"shots": shots, "description": "Name the young."}) == TEXT
    assert prompt_of({"shots": shots}) == "cow\ncalf\n\nowl\nowlet"
    examples = [Example("0", "cow", "calf"), Example("1", "owl", "owlet")]
    assert prompt_of({"shots": shots, "description": "Name."}) == system_prompt("Name.", examples)


@pytest.mark.parametrize(
    ("shots", "field", "code", "facts"),
    [
        ([], "shots", "type", ()),
        ("x", "shots", "type", ()),
        ([{"input": "a", "output": "b"}, "x"], "shots.1", "type", ("shot 2",)),
        ([{"input": "a"}], "shots.0.output", "missing", ("shot 1",)),
        ([{"response": "a"}], "shots.0.query", "missing", ("shot 1",)),
        ([{"input": "a", "response": "b"}], "shots.0.output", "missing", ("shot 1",)),
        ([{"input": "a", "output": 4}], "shots.0.output", "type", ("shot 1", "int")),
        ([{"input": "", "output": "b"}], "shots.0.input", "empty", ("shot 1",)),
    ],
)
def test_shots_that_are_none_are_refused(shots, field, code, facts):
    with raises(DataError, field, *facts, code=code):
        prompt_of({"shots": shots})


def test_files_of_a_conversation_and_of_shots(tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps(CHAT, indent=1))
    assert read_chat(tmp_path / "chat.json") == TEXT
    (tmp_path / "body.json").write_text(json.dumps({"model": "x", "messages": CHAT}))
    assert read_chat(tmp_path / "body.json") == TEXT
    (tmp_path / "beside.json").write_text(json.dumps({"system": CHAT[0]["content"], "messages": CHAT[1:]}))
    assert read_chat(tmp_path / "beside.json") == TEXT
    (tmp_path / "twice.json").write_text(json.dumps({"system": "Be brief.", "messages": CHAT}))
    with raises(DataError, "twice.json:messages.1.role", tmp_path / "twice.json", code="order"):
        read_chat(tmp_path / "twice.json")
    shots = write_rows(
        tmp_path / "shots.jsonl", [{"input": "cow", "output": "calf"}, {"query": "owl", "response": "o"}]
    )
    assert read_shots(shots, "Name.") == "Name.\n\ncow\ncalf\n\nowl\no"
    assert read_shots(shots).startswith("cow\n")


@pytest.mark.parametrize(
    ("content", "place", "code"),
    [
        (b"[\n{]", ":2", "json"),
        (b"[" * 100_000, ":1", "json"),
        (b"\xff", ":1", "encoding"),
        (b"", "", "empty"),
        (b"3", ":messages", "type"),
        (b'{"chat": []}', ":messages", "type"),
        (json.dumps(turns("a")).encode(), ":messages.0", "unanswered"),
    ],
)
def test_a_conversation_file_that_is_none_is_named(tmp_path, content, place, code):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with raises(DataError, f"chat.json{place}", code=code) as error:
        read_chat(path)
    assert str(error.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path):
    for read in (read_chat, read_shots, read_prompts):
        with raises(DataError, "gone.json", tmp_path / "gone.json", code="unreadable"):
            read(tmp_path / "gone.json")


def test_a_bad_line_of_shots_is_named(tmp_path):
    path = write_rows(tmp_path / "shots.jsonl", [{"input": "a", "output": "b"}, {"input": "a"}])
    with raises(DataError, "shots.jsonl:2:output", f"{path}:2", code="missing"):
        read_shots(path)


def test_many_prompts_of_every_kind_are_read_in_order(tmp_path):
    rows = [
        {"prompt": "Be brief."},
        {"name": "young-1.0_x", "messages": CHAT},
        {"shots": [{"input": "cow", "output": "calf"}], "description": "Name."},
        {"shots": [{"query": "cow", "response": "calf"}], "name": None},
        *({"prompt": "more"} for _ in range(8)),
    ]
    found = read_prompts(write_rows(tmp_path / "many.jsonl", rows))
    assert [p.text for p in found[:4]] == ["Be brief.", TEXT, "Name.\n\ncow\ncalf", "cow\ncalf"]
    assert [p.name for p in found[:5]] == ["01", "young-1.0_x", "03", "04", "05"]
    assert found[-1].name == "12"


def test_prompts_without_a_name_are_called_by_their_line_or_by_their_place_in_an_array(tmp_path):
    (tmp_path / "gaps.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [p.name for p in read_prompts(tmp_path / "gaps.jsonl")] == ["1", "3"]
    (tmp_path / "array.json").write_text('[{"prompt": "a"}, {"prompt": "b"}]')
    assert [p.name for p in read_prompts(tmp_path / "array.json")] == ["1", "2"]


@pytest.mark.parametrize(
    ("row", "field", "code", "facts"),
    [
        ({"name": "../x", "prompt": "a"}, "name", "malformed", ("'../x'",)),
        ({"name": "/etc", "prompt": "a"}, "name", "malformed", ()),
        ({"name": ".hidden", "prompt": "a"}, "name", "malformed", ()),
        ({"name": "..", "prompt": "a"}, "name", "malformed", ()),
        ({"name": "a/b", "prompt": "a"}, "name", "malformed", ()),
        ({"name": "a\n", "prompt": "a"}, "name", "malformed", ()),
        ({"name": "", "prompt": "a"}, "name", "malformed", ()),
        ({"name": "é", "prompt": "a"}, "name", "malformed", ()),
        ({"name": 3, "prompt": "a"}, "name", "malformed", ()),
        ({"name": "x" * 65, "prompt": "a"}, "name", "malformed", ("1 to 64",)),
        ({"name": "first", "prompt": "a"}, "name", "taken", ("'first'", "line 1")),
        ({"name": "FIRST", "prompt": "a"}, "name", "taken", ("'FIRST'", "line 1")),
        ({}, "prompt", "count", ('"prompt", "messages"', "none")),
        ({"prompt": "a", "shots": []}, "prompt", "count", ('"prompt" and "shots"',)),
        ({"prompt": "a", "description": "b"}, "description", None, ('"prompt"',)),
        ({"prompt": " "}, "prompt", "empty", ()),
        ({"prompt": ["a"]}, "prompt", "type", ("list",)),
        ({"prompt": None}, "prompt", "type", ("NoneType",)),
        ({"prompt": "\udc80"}, "prompt", "surrogate", ()),
        ({"promt": "a"}, "promt", "unknown", ("promt", "prompt, messages, shots")),
        ({"messages": turns("a")}, "messages.0", "unanswered", ("message 1",)),
        ({"shots": [{"input": "a"}]}, "shots.0.output", "missing", ("shot 1",)),
        ({"shots": [{"input": "a", "output": "b"}], "description": 3}, "description", "type", ("int",)),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, row, field, code, facts):
    path = write_rows(tmp_path / "many.jsonl", [{"name": "first", "prompt": "a"}, row])
    with raises(DataError, f"many.jsonl:2:{field}", *facts, code=code) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_a_given_name_that_is_another_rows_line_is_refused(tmp_path):
    path = write_rows(tmp_path / "many.jsonl", [{"name": "2", "prompt": "a"}, {"prompt": "b"}])
    with raises(DataError, "many.jsonl:2:name", f"{path}:2", "'2'", "line 1", code="taken"):
        read_prompts(path)


def test_a_file_with_a_line_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "many.jsonl").write_text('{"prompt": "a"}\n"b"\n')
    with raises(DataError, "many.jsonl:2", "string", code="type"):
        read_prompts(tmp_path / "many.jsonl")


def test_an_object_from_elsewhere_reads_as_a_row_does():
    assert prompt_of({"messages": CHAT}) == TEXT
    assert prompt_of({"prompt": " as it is\n"}) == " as it is\n"
