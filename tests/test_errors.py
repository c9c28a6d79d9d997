"""Errors name what is wrong for programs and for people, wherever they are raised."""

import ast
import pickle
from pathlib import Path

import pytest
from helpers import raises, unsaid

import lora_gen_jax
from lora_gen_jax import errors
from lora_gen_jax.errors import ConfigError, DataError, LoraGenError
from lora_gen_jax.serving.errors import ApiError
from lora_gen_jax.serving.scheduler import Closing, Failed, QueueFull
from lora_gen_jax.training.loop import TrainingDivergedError

KINDS = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LoraGenError)}
KINDS |= {kind.__name__ for kind in (Closing, Failed, QueueFull, TrainingDivergedError)}


def raised():
    """(file:line, keywords) of every call in the package that makes an error with a field."""
    for path in Path(lora_gen_jax.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                yield f"{path.name}:{node.lineno}", {keyword.arg for keyword in node.keywords}


def test_every_error_of_the_package_names_its_field():
    """An error about a whole item of a list has a code alone; `within` says which item it is."""
    found = dict(raised())
    assert len(found) > 400
    assert [place for place, keywords in found.items() if not keywords & {"field", "code"}] == []


@pytest.mark.parametrize(
    ("problem", "remedy", "text"),
    [
        ("top_k is 9", None, "top_k is 9"),
        ("top_k is 9", "lower it", "top_k is 9: lower it"),
        ("a.json:3: no text", "save it as UTF-8", "a.json:3: no text; save it as UTF-8"),
        ("the file is damaged", "Download it again", "the file is damaged. Download it again"),
    ],
)
def test_a_problem_and_its_remedy_read_as_one_text(problem, remedy, text):
    assert str(DataError(problem, remedy=remedy)) == text


def test_an_error_said_of_a_place_keeps_what_it_knows():
    inner = DataError('"input" is empty', field="input", code="empty", remedy="write something")
    outer = inner.within("rows.jsonl:3", "rows.jsonl:3:", remedy="another")
    assert type(outer) is DataError
    assert (outer.field, outer.code, outer.remedy) == ("rows.jsonl:3:input", "empty", "write something")
    assert str(outer) == 'rows.jsonl:3: "input" is empty; write something'
    whole = ConfigError("it must be an object", code="type").within("message 1", "messages.0.", remedy="look at it")
    assert (whole.field, whole.code, whole.remedy) == ("messages.0", "type", "look at it")
    assert DataError("x").within("run a").field is None


def test_errors_survive_the_way_from_another_process():
    error = DataError("a text is empty", field="input", code="empty", remedy="write something")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (DataError, str(error), vars(error))


def test_the_interface_says_the_field_and_the_code():
    said = ApiError(400, "n is 9", "n", "too_many").body["error"]
    assert said == {"message": "n is 9", "type": "invalid_request_error", "param": "n", "code": "too_many"}


@pytest.mark.parametrize(
    "other",
    [
        ConfigError("5 rows", field="rows", code="range"),
        DataError("5 rows", field="columns", code="range"),
        DataError("5 rows", field="rows", code="type"),
        DataError("15 rows", field="rows", code="range"),
        DataError("0.5 rows", field="rows", code="range"),
    ],
)
def test_tests_tell_errors_apart_by_kind_field_code_and_facts(other):
    def fails(error):
        with raises(DataError, "rows", 5, code="range"):
            raise error

    fails(DataError("rows are 5", field="rows", code="range"))
    with pytest.raises((AssertionError, ConfigError)):
        fails(other)


def test_a_fact_is_found_as_a_whole_only():
    text = "a/b.json:3: width 0.5 of [1.0, 2], 'x' and --out"
    assert unsaid(text, ["a/b.json", 3, 0.5, "[1.0, 2]", "'x'", "--out", "b.json"]) == []
    assert unsaid(text, [5, "b", "json", 1, "ou", "y"]) == [5, "b", "json", 1, "ou", "y"]
