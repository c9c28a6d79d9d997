"""Scores of function calls. In: what a model wrote and gold's possible values. Out: names, arguments, both.

A call is ``name(argument=value, …)`` at the start of a line (after a bullet, a bracket or a backtick), or right after
another call. Values are read as Python literals and never run; a bare word is a text. Calls may stand in any order.

names is 1 where exactly gold's functions are called, each as often; arguments is the share of gold's calls for which a
call of that function has right arguments, no call counting twice; exact is 1 where both are 1. Where gold has no call
all three are 1 if nothing is called, else 0.

An argument is right if its value equals one of the possible ones: texts without case, spaces and the characters
,./-_*^ and with either quotation mark; numbers by value, so 5 is 5.0 (True is not a number); lists entry by entry, in
order; a dictionary key by key, each key with possible values of its own. Only what has "" among its possible values,
or none at all, may be left out, and nothing may be added.
"""

import ast
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation.means import standard_error

Gold = Sequence[tuple[str, Mapping[str, list[Any]]]]
_NAME = re.compile(r"[A-Za-z_][\w.\-/]*(?=\()")
_LINE = re.compile(r"^[ \t]*(?:(?:[-*•>]|\d+[.)])[ \t]+)?[`\[( \t]*", re.MULTILINE)
_BETWEEN = re.compile(r"[ \t,;`]*")
_IGNORED = re.compile(r"[ ,./\-_*^]")
# A call that no bracket closes is looked at so often and no longer.
_MOST_BRACKETS = 64


@dataclass(frozen=True)
class FunctionCall:
    """A call as it was written.

    Attributes:
        name: of the function.
        arguments: by name; None where one has no name, comes twice or is not a literal, so that none can be right.
    """

    name: str
    arguments: Mapping[str, Any] | None


@dataclass(frozen=True)
class CallScore:
    """The scores of one row, in [0, 1]."""

    names: float
    arguments: float
    exact: float


def parse_calls(text: str) -> list[FunctionCall]:
    """The calls of an output, in order; everything else in it is skipped."""
    calls: list[FunctionCall] = []
    at = 0
    while (line := _LINE.search(text, at)) is not None:
        at = line.end()
        while (found := _call_at(text, at)) is not None:
            call, end = found
            calls.append(call)
            between = _BETWEEN.match(text, end)
            at = end if between is None else between.end()
        following = text.find("\n", at)
        if following < 0:
            break
        at = following + 1
    return calls


def score_calls(predicted: Sequence[FunctionCall], gold: Gold) -> CallScore:
    """Scores the calls of one row, by the rules at the head of this file."""
    if not gold:
        right = float(not predicted)
        return CallScore(right, right, right)
    names = float(Counter(call.name for call in predicted) == Counter(name for name, _ in gold))
    fits = [[call.name == name and right_arguments(call, wanted) for call in predicted] for name, wanted in gold]
    arguments = _matched(fits) / len(gold)
    return CallScore(names, arguments, float(names == 1 and arguments == 1))


def right_arguments(call: FunctionCall, wanted: Mapping[str, list[Any]]) -> bool:
    """Whether every argument of a call is right and none is missing."""
    return call.arguments is not None and _same_keys(call.arguments, wanted)


def summarize_calls(scores: Sequence[CallScore]) -> dict[str, float]:
    """Means over rows: names, arguments and exact; the standard error of exact, and n."""
    if not scores:
        raise DataError("there are no function calls to summarize", field="scores", remedy="score at least one row")
    exact = [score.exact for score in scores]
    return {
        "names": statistics.fmean(score.names for score in scores),
        "arguments": statistics.fmean(score.arguments for score in scores),
        "exact": statistics.fmean(exact),
        "stderr": standard_error(exact),
        "n": len(scores),
    }


def _call_at(text: str, start: int) -> tuple[FunctionCall, int] | None:
    """The call that begins at `start`, and where it ends."""
    name = _NAME.match(text, start)
    if name is None:
        return None
    end = name.end()
    for _ in range(_MOST_BRACKETS):
        end = text.find(")", end) + 1
        if end == 0:
            return None
        # The name stays out: functions' names may hold what Python's may not.
        tree = _parsed(f"f{text[name.end() : end]}")
        if isinstance(tree, ast.Call):
            return FunctionCall(name[0], _arguments(tree)), end
    return None


def _parsed(source: str) -> ast.expr | None:
    try:
        with warnings.catch_warnings():
            # A text with a backslash in it is none of the user's concern.
            warnings.simplefilter("ignore")
            return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _arguments(call: ast.Call) -> dict[str, Any] | None:
    values: dict[str, Any] = {}
    if call.args:
        return None
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in values:
            return None
        try:
            values[keyword.arg] = _value(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return None
    return values


def _value(node: ast.expr) -> Any:
    """A literal's value; a bare word is a text. Raises ValueError for anything that would have to be run."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("a dictionary is unpacked into another one")
        keys = [_value(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_value, node.values), strict=True))
    return ast.literal_eval(node)


def _same(made: Any, wanted: Any) -> bool:
    if isinstance(made, str) and isinstance(wanted, str):
        return _standard(made) == _standard(wanted)
    if isinstance(made, bool) or isinstance(wanted, bool):
        return made is wanted
    if isinstance(made, (int, float)) and isinstance(wanted, (int, float)):
        return made == wanted
    if isinstance(made, list) and isinstance(wanted, list):
        return len(made) == len(wanted) and all(map(_same, made, wanted))
    if isinstance(made, dict) and isinstance(wanted, dict):
        return _same_keys(made, wanted)
    return made is None and wanted is None


def _same_keys(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether what is given is among the possible values of its key, and only optional keys are missing."""
    if not made.keys() <= wanted.keys():
        return False
    # Some files give a key of a dictionary its one value instead of a list of possible ones.
    possible = {key: values if isinstance(values, list) else [values] for key, values in wanted.items()}
    return all(
        any(_same(made[key], value) for value in values) if key in made else "" in values or not values
        for key, values in possible.items()
    )


def _standard(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _matched(fits: list[list[bool]]) -> int:
    """How many gold calls find a call of their own (rows gold, columns predicted)."""
    owner: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in tried:
                tried.add(column)
                if column not in owner or place(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    return sum(place(row, set()) for row in range(len(fits)))
