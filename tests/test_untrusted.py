"""Metadata from anywhere: within bounds, of the types that a schema names, or an error that names the field."""

from typing import Annotated, Literal

import numpy as np
import pytest
from helpers import raises

from lora_gen_jax.errors import DataError, ModelError
from lora_gen_jax.untrusted import check_digests, check_fields, check_tensors, digest_of, fits, parse_json, read_object


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -3, 2**70], [True, 1.0, "1", None, []]),
        (float, [1, 1.5], [float("nan"), float("inf"), True, "1"]),
        (int | None, [None, 1], ["", 1.5]),
        (Annotated[int, 1, 10], [1, 10], [0, 11, True, "5", None]),
        (list[str], [[], ["a"]], [["a", 1], "a", {"a": 1}]),
        (dict[str, str], [{}, {"a": "b"}], [{"a": 1}, [], "a"]),
        (Literal["a", 1], ["a", 1], [True, "b", [], {}]),
    ],
)
def test_a_value_fits_its_type_or_does_not(hint, good, bad):
    assert [fits(value, hint) for value in good] == [True] * len(good)
    assert [fits(value, hint) for value in bad] == [False] * len(bad)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "NaN", '"\\ud800"', '{"a": -Infinity}', "1" * 5000])
def test_json_beyond_the_bounds_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


def test_json_within_the_bounds_is_read():
    assert parse_json('{"a": [1, 2.5, "\\u00e9", null]}') == {"a": [1, 2.5, "é", None]}


def test_a_file_that_holds_no_object_and_fields_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "x.json"
    with raises(ModelError, "x.json", path, code="unreadable"):
        read_object(path, ModelError)
    path.write_text("[]")
    with raises(DataError, "x.json", path, code="type"):
        read_object(path, DataError)
    schema = {"a": int, "b": str | None}
    check_fields({"a": 1, "new": 2}, schema, "x.json", DataError)
    with raises(DataError, "x.json:a", code="missing"):
        check_fields({"b": "x"}, schema, "x.json", DataError)
    with raises(DataError, "x.json:b", 5, code="type"):
        check_fields({"a": 1, "b": 5}, schema, "x.json", DataError)


@pytest.mark.parametrize(
    ("found", "field", "code"),
    [
        ({}, "f:a", "missing"),
        ({"a": np.ones(2), "b": np.ones(1)}, "f:b", "unknown"),
        ({"a": np.ones(3)}, "f:a", "shape"),
        ({"a": np.array([1, np.nan])}, "f:a", "not finite"),
    ],
)
def test_tensors_are_those_expected(found, field, code):
    check_tensors({"a": np.ones(2)}, {"a": (2,)}, "f", DataError)
    with raises(DataError, field, code=code):
        check_tensors(found, {"a": (2,)}, "f", DataError)


def test_a_digest_depends_on_type_shape_and_bytes_and_on_no_order():
    x = np.arange(4, dtype=np.float32)
    others = [x.astype(np.float16), x.reshape(2, 2), x + 1, np.float32(0)]
    assert len({digest_of(one) for one in [x, *others]}) == 5
    assert digest_of({"a": 1, 2: (3,)}) == digest_of({"2": [3], "a": 1})
    from lora_gen_jax.errors import CheckpointError

    for found in ({}, {"a": "y"}, {"a": "x", "b": "z"}):
        with raises(CheckpointError, "a" if found.get("a") != "x" else "b", code="damaged"):
            check_digests(found, {"a": "x"}, "f")
