"""From conversations, examples and files of many prompts to system prompts; every mistake is named where it stands."""

import json

import pytest
from helpers import write_rows

from lora_gen_jax.data.prompt_sources import chat_prompt, prompt_of, read_chat, read_prompts, read_shots, shots_prompt
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
    ("messages", "words"),
    [
        ([], "must be a list of objects"),
        ("hello", "must be a list of objects"),
        ({}, "must be a list of objects"),
        ([1], "message 1: it must be an object"),
        ([{"role": "tool", "content": "x"}], "message 1: \"role\" is 'tool'"),
        ([{"role": ["user"], "content": "x"}], 'message 1: "role" is'),
        ([{"role": "user"}], 'message 1: the field "content" is missing'),
        ([system("x"), {"role": "user", "content": 3}], 'message 2: "content" must be text, found int'),
        ([{"role": "user", "content": None}], 'message 1: "content" must be text, found NoneType'),
        ([system("x"), {"role": "user", "content": " "}], 'message 2: "content" is empty'),
        ([{"role": "user", "content": "\ud800"}], "message 1: .*surrogate"),
        ([*turns("a", "b"), system("x")], "message 3: only the first message"),
        ([*turns("a", "b", "c")], "message 3 is a user's turn without an answer"),
        ([system("x"), *turns("a")], "message 2 is a user's turn without an answer.*generate --input"),
        ([*turns("a"), *turns("b")], 'message 2 has the role "user", expected "assistant"'),
        ([turns("a", "b")[1]], 'message 1 has the role "assistant", expected "user"'),
        ([system("")], "neither a system text nor"),
    ],
)
def test_a_conversation_that_is_no_prompt_is_refused(messages, words):
    with pytest.raises(DataError, match=words):
        chat_prompt(messages)


def test_shots_become_a_prompt_with_a_description_or_without():
    shots = [{"input": "cow", "output": "calf"}, {"query": "owl", "response": "owlet", "id": 7}]
    assert shots_prompt(shots, "Name the young.") == TEXT
    assert shots_prompt(shots) == "cow\ncalf\n\nowl\nowlet"
    examples = [Example("0", "cow", "calf"), Example("1", "owl", "owlet")]
    assert shots_prompt(shots, "Name.") == system_prompt("Name.", examples)


@pytest.mark.parametrize(
    ("shots", "words"),
    [
        ([], "at least one"),
        ("x", "must be a list"),
        ([{"input": "a", "output": "b"}, "x"], "shot 2: it must be an object"),
        ([{"input": "a"}], 'shot 1: the field "output" is missing'),
        ([{"response": "a"}], 'shot 1: the field "query" is missing'),
        ([{"input": "a", "response": "b"}], 'shot 1: the field "output" is missing'),
        ([{"input": "a", "output": 4}], 'shot 1: "output" must be text, found int'),
        ([{"input": "", "output": "b"}], 'shot 1: "input" is empty'),
    ],
)
def test_shots_that_are_none_are_refused(shots, words):
    with pytest.raises(DataError, match=words):
        shots_prompt(shots)


def test_files_of_a_conversation_and_of_shots(tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps(CHAT, indent=1))
    assert read_chat(tmp_path / "chat.json") == TEXT
    (tmp_path / "body.json").write_text(json.dumps({"model": "x", "messages": CHAT}))
    assert read_chat(tmp_path / "body.json") == TEXT
    (tmp_path / "beside.json").write_text(json.dumps({"system": CHAT[0]["content"], "messages": CHAT[1:]}))
    assert read_chat(tmp_path / "beside.json") == TEXT
    (tmp_path / "twice.json").write_text(json.dumps({"system": "Be brief.", "messages": CHAT}))
    with pytest.raises(DataError, match=r'only the first message may have the role "system"'):
        read_chat(tmp_path / "twice.json")
    shots = write_rows(
        tmp_path / "shots.jsonl", [{"input": "cow", "output": "calf"}, {"query": "owl", "response": "o"}]
    )
    assert read_shots(shots, "Name.") == "Name.\n\ncow\ncalf\n\nowl\no"
    assert read_shots(shots).startswith("cow\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[\n{]", ":2: not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff", ":1: not UTF-8"),
        (b"", "the file is empty"),
        (b"3", "must be a list of objects"),
        (b'{"chat": []}', "must be a list of objects"),
        (json.dumps(turns("a")).encode(), "message 1 is a user's turn"),
    ],
)
def test_a_conversation_file_that_is_none_is_named(tmp_path, content, words):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        read_chat(path)
    assert str(error.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path):
    for read in (read_chat, read_shots, read_prompts):
        with pytest.raises(DataError, match=r"gone\.json: cannot be read"):
            read(tmp_path / "gone.json")


def test_a_bad_line_of_shots_is_named(tmp_path):
    path = write_rows(tmp_path / "shots.jsonl", [{"input": "a", "output": "b"}, {"input": "a"}])
    with pytest.raises(DataError, match=r'shots\.jsonl:2: the field "output" is missing'):
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
    ("row", "words"),
    [
        ({"name": "../x", "prompt": "a"}, r"\"name\" is '\.\./x'"),
        ({"name": "/etc", "prompt": "a"}, '"name" is'),
        ({"name": ".hidden", "prompt": "a"}, '"name" is'),
        ({"name": "..", "prompt": "a"}, '"name" is'),
        ({"name": "a/b", "prompt": "a"}, '"name" is'),
        ({"name": "a\n", "prompt": "a"}, '"name" is'),
        ({"name": "", "prompt": "a"}, '"name" is'),
        ({"name": "é", "prompt": "a"}, '"name" is'),
        ({"name": 3, "prompt": "a"}, '"name" is'),
        ({"name": "x" * 65, "prompt": "a"}, "1 to 64 letters"),
        ({"name": "first", "prompt": "a"}, "'first' is taken by line 1"),
        ({"name": "FIRST", "prompt": "a"}, "'FIRST' is taken by line 1"),
        ({}, "exactly one of .* found none"),
        ({"prompt": "a", "shots": []}, 'found "prompt" and "shots"'),
        ({"prompt": "a", "description": "b"}, 'put it into "prompt"'),
        ({"prompt": " "}, '"prompt" is empty'),
        ({"prompt": ["a"]}, '"prompt" must be text, found list'),
        ({"prompt": None}, '"prompt" must be text, found NoneType'),
        ({"prompt": "\udc80"}, '"prompt" holds half of a surrogate pair'),
        ({"promt": "a"}, 'unknown field "promt"'),
        ({"messages": turns("a")}, "message 1 is a user's turn"),
        ({"shots": [{"input": "a"}]}, 'shot 1: the field "output" is missing'),
        ({"shots": [{"input": "a", "output": "b"}], "description": 3}, '"description" must be text'),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, row, words):
    path = write_rows(tmp_path / "many.jsonl", [{"name": "first", "prompt": "a"}, row])
    with pytest.raises(DataError, match=words) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_a_given_name_that_is_another_rows_line_is_refused(tmp_path):
    path = write_rows(tmp_path / "many.jsonl", [{"name": "2", "prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(DataError, match=r"many\.jsonl:2: .*'2' is taken by line 1"):
        read_prompts(path)


def test_a_file_with_a_line_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "many.jsonl").write_text('{"prompt": "a"}\n"b"\n')
    with pytest.raises(DataError, match=r"many\.jsonl:2: expected a JSON object, found a string"):
        read_prompts(tmp_path / "many.jsonl")


def test_an_object_from_elsewhere_reads_as_a_row_does():
    assert prompt_of({"messages": CHAT}) == TEXT
    assert prompt_of({"prompt": " as it is\n"}) == " as it is\n"
