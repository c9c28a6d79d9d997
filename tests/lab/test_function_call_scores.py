"""Function calls: what counts as a call, and scores worked out by hand."""

import pytest
from helpers import raises

from lora_gen_jax.errors import DataError
from lora_gen_jax.lab.agent.function_calls import (
    CallScore,
    FunctionCall,
    parse_calls,
    right_arguments,
    score_calls,
    summarize_calls,
)

DEEP = "(" * 4000 + ")" * 4000
PARSED = {
    "plain": ('f(a=1, b="x")', [("f", {"a": 1, "b": "x"})]),
    "no arguments": ("f()", [("f", {})]),
    "dots and hyphens in a name": ("a.b-c.d(x=1)", [("a.b-c.d", {"x": 1})]),
    "a list of calls": ("[f(a=1), g(b=2)]", [("f", {"a": 1}), ("g", {"b": 2})]),
    "lines, semicolons, fences": ("```python\nf(a=1); g(a=2)\nh()\n```", [("f", {"a": 1}), ("g", {"a": 2}), ("h", {})]),
    "bullets and numbers": ("- f(a=1)\n2. g()\n* `h()`", [("f", {"a": 1}), ("g", {}), ("h", {})]),
    "over several lines": ("f(\n  a=[1,\n 2],\n)\ng()", [("f", {"a": [1, 2]}), ("g", {})]),
    "brackets and quotes in a text": ("f(a=\"x) g(b='1')\", b='it\\'s')", [("f", {"a": "x) g(b='1')", "b": "it's"})]),
    "literals": (
        "f(a=-1.5, b=True, c=None, d=(1, 2), e={'k': [False]})",
        [("f", {"a": -1.5, "b": True, "c": None, "d": [1, 2], "e": {"k": [False]}})],
    ),
    "a bare word is a text": ("f(unit=celsius, on=true)", [("f", {"unit": "celsius", "on": "true"})]),
    "nothing is run": ("f(a=__import__('os').getcwd())", [("f", None)]),
    "calls inside calls": ("f(a=g(b=1))", [("f", None)]),
    "arithmetic": ("f(a=2*3)", [("f", None)]),
    "without a name": ("f(1)", [("f", None)]),
    "unpacked": ("f(**{'a': 1})", [("f", None)]),
    "unpacked inside": ("f(a={**{}})", [("f", None)]),
    "unhashable key": ("f(a={[1]: 2})", [("f", None)]),
    "the same argument twice": ("f(a=1, a=2)", [("f", None)]),
    "over a list's lines": ("[f(a=1),\n g(b=2)]", [("f", {"a": 1}), ("g", {"b": 2})]),
    "never closed": ("f(a=1", []),
    "prose": ("I would call f(a=1) here.\nThe function(s) fit.", []),
    "prose before a call": ("Sure:\nf(a=1)", [("f", {"a": 1})]),
    "behind a call only what follows at once": ("f(a=1) and g(b=2)", [("f", {"a": 1})]),
    "no call": ("no call", []),
    "empty": ("", []),
    "a space before the bracket": ("f (a=1)", []),
    "backslashes": (r'f(a="\d")', [("f", {"a": "\\d"})]),
    "too deep": (f"f(a={DEEP})\ng()", [("g", {})]),
    "a null byte": ("f(a='\0')\ng()", [("g", {})]),
}


@pytest.mark.parametrize("name", list(PARSED))
def test_parsing(name):
    text, expected = PARSED[name]
    assert parse_calls(text) == [FunctionCall(*call) for call in expected]


VALUES = {
    # value, possible values, whether it is right
    "case, spaces and punctuation": ("New-York, NY.", ["new york ny"], True),
    "any possible value": ("b", ["a", "b"], True),
    "quotation marks": ("say 'x'", ['say "x"'], True),
    "other words": ("york", ["new york"], False),
    "digits are no text": (5, ["5"], False),
    "texts are no numbers": ("5", [5], False),
    "whole and real": (5.0, [5], True),
    "not nearly": (5.01, [5], False),
    "true is not one": (True, [1], False),
    "one is not true": (1, [True], False),
    "true": (True, [True, ""], True),
    "none": (None, [None], True),
    "none is no text": (None, [""], False),
    "an empty optional text": ("", ["a", ""], True),
    "a list": (["A b", 2], [["a-b", 2.0]], True),
    "a list in another order": ([2, 1], [[1, 2]], False),
    "a longer list": ([1, 2, 3], [[1, 2]], False),
    "an entry of a list is no list": (1, [[1]], False),
    "lists of lists": ([[1], [2, 3]], [[[1], [2, 3]]], True),
    "a dictionary": ({"a": "X"}, [{"a": ["x", "y"], "b": ["", 3]}], True),
    "its optional key, wrong": ({"a": "x", "b": 4}, [{"a": ["x"], "b": ["", 3]}], False),
    "its required key is missing": ({"b": 3}, [{"a": ["x"], "b": ["", 3]}], False),
    "a key too many": ({"a": "x", "c": 1}, [{"a": ["x"]}], False),
    "dictionaries in a list": ([{"q": 2}, {"q": 3}], [[{"q": [2]}, {"q": [3]}]], True),
    "a key with its one value": ({"a": 1.5}, [{"a": 1.5}], True),
    "a list as a dictionary's value": ({"a": [1, 2]}, [{"a": [[1, 2]]}], True),
}


@pytest.mark.parametrize("name", list(VALUES))
def test_values(name):
    value, possible, right = VALUES[name]
    assert right_arguments(FunctionCall("f", {"x": value}), {"x": possible}) is right


GOLD = [("f", {"x": [1], "y": ["a", ""]})]
BOTH = [*GOLD, ("g", {"x": [2]})]
TWICE = [("f", {"x": [1, 2]}), ("f", {"x": [1]})]
SCORES = {
    # output, gold, names, arguments, exact
    "right": ("f(x=1)", GOLD, 1, 1, 1),
    "the optional argument, right": ("f(x=1, y='A')", GOLD, 1, 1, 1),
    "the optional argument, wrong": ("f(x=1, y='b')", GOLD, 1, 0, 0),
    "a required argument is missing": ("f(y='a')", GOLD, 1, 0, 0),
    "an argument without any possible value": ("f(x=1)", [("f", {"x": [1], "y": []})], 1, 1, 1),
    "a value for it": ("f(x=1, y=1)", [("f", {"x": [1], "y": []})], 1, 0, 0),
    "an invented argument": ("f(x=1, z=2)", GOLD, 1, 0, 0),
    "another function": ("g(x=1)", GOLD, 0, 0, 0),
    "a name's case counts": ("F(x=1)", GOLD, 0, 0, 0),
    "nothing": ("no call", GOLD, 0, 0, 0),
    "right, and once more": ("f(x=1)\nf(x=1)", GOLD, 0, 1, 0),
    "in another order": ("g(x=2)\nf(x=1)", BOTH, 1, 1, 1),
    "one of two": ("g(x=2)", BOTH, 0, 0.5, 0),
    "both names, one argument": ("f(x=3)\ng(x=2)", BOTH, 1, 0.5, 0),
    # The first output fits both gold calls, the second one only the first: they must not take each other's place.
    "pairs are found": ("f(x=1)\nf(x=2)", TWICE, 1, 1, 1),
    "no output counts twice": ("f(x=1)", TWICE, 0, 0.5, 0),
    "unreadable arguments": ("f(1)", [("f", {})], 1, 0, 0),
    "no call wanted, none made": ("I cannot do that.", [], 1, 1, 1),
    "no call wanted, one made": ("f(x=1)", [], 0, 0, 0),
}


@pytest.mark.parametrize("name", list(SCORES))
def test_scores(name):
    output, gold, *expected = SCORES[name]
    assert score_calls(parse_calls(output), gold) == CallScore(*expected)


def test_means():
    summary = summarize_calls([CallScore(1, 0.5, 0), CallScore(1, 1, 1), CallScore(0, 0, 0)])
    assert summary == {
        "names": pytest.approx(2 / 3),
        "arguments": 0.5,
        "exact": pytest.approx(1 / 3),
        "stderr": pytest.approx(1 / 3),
        "n": 3,
    }
    with raises(DataError, "scores"):
        summarize_calls([])
