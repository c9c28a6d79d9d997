"""Reads JSONL (or one JSON array) of objects. In: a path. Out: (line number, row) pairs, or an error with the line."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lora_gen_jax.errors import DataError

Row = dict[str, Any]
T = TypeVar("T")
_BETWEEN = re.compile(r"[\s,]*")


def read_text(path: Path) -> str:
    """The file's text. Raises DataError where the file cannot be read, is not UTF-8 (naming the line) or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}", field=path.name, code="unreadable"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem, remedy = f"{path}:{line}: not UTF-8 text", "save the file as UTF-8"
        raise DataError(problem, field=f"{path.name}:{line}", code="encoding", remedy=remedy) from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty", field=path.name, code="empty")
    return text


def read_rows(path: Path) -> list[tuple[int, Row]]:
    """All rows of a JSONL file or of a file holding one JSON array, with the line each starts on (from 1).

    Raises DataError naming file and line: bad JSON, a row that is not an object, not UTF-8, an empty file.
    """
    text = read_text(path)
    values = _array(path, text) if text.lstrip().startswith("[") else _lines(path, text)
    rows: list[tuple[int, Row]] = []
    for line, value in values:
        if not isinstance(value, dict):
            raise DataError(
                f"{path}:{line}: expected a JSON object, found {_kind(value)}", field=f"{path.name}:{line}", code="type"
            )
        rows.append((line, value))
    if not rows:
        raise DataError(f"{path}: the file holds no rows", field=path.name, code="empty")
    return rows


def map_rows(path: Path, rows: list[tuple[int, Row]], make: Callable[[int, Row], T]) -> list[T]:
    """`make(index, row)` of every row; whatever a malformed row raises becomes a DataError with file and line."""
    made: list[T] = []
    for index, (line, row) in enumerate(rows):
        try:
            made.append(make(index, row))
        except DataError as error:
            raise error.within(f"{path}:{line}", f"{path.name}:{line}:") from error
        except KeyError as error:
            problem = f"{path}:{line}: the field {error} is missing"
            raise DataError(problem, field=f"{path.name}:{line}:{error.args[0]}", code="missing") from error
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"{path}:{line}: malformed row: {error}", field=f"{path.name}:{line}", code="malformed"
            ) from error
    return made


def parsed(path: Path, text: str, line: int = 1) -> Any:
    """What JSON holds that stands in a file from this line on. Raises DataError naming the line where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            line, reason = line + error.lineno - 1, error.msg
        else:
            reason = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        problem = f"{path}:{line}: not valid JSON ({reason}); a .jsonl file holds one object a line"
        raise DataError(problem, field=f"{path.name}:{line}", code="json") from error


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not str.splitlines: it also breaks at U+2028 and its like, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, parsed(path, line, number)


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    values, decoder = parsed(path, text), json.JSONDecoder()
    line, counted, position = 1, 0, text.index("[") + 1
    for value in values:
        position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        yield line, value
        _, position = decoder.raw_decode(text, position)


def _kind(value: object) -> str:
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "an array"}
    return "null" if value is None else names[type(value)]
