"""Reads JSONL (or one JSON array) of objects. In: a path. Out: (line number, row) pairs, or an error with the line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lora_gen_jax.errors import DataError

Row = dict[str, Any]
T = TypeVar("T")


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
        raise DataError(
            f"{path}:{line}: not UTF-8 text",
            field=f"{path.name}:{line}",
            code="encoding",
            remedy="save the file as UTF-8",
        ) from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty", field=path.name, code="empty")
    return text


def read_rows(path: Path) -> list[tuple[int, Row]]:
    """All rows of a JSONL file or of a file holding one JSON array, with the line each starts on (from 1).

    Raises DataError naming file and line: bad JSON, a row that is no object, not UTF-8, an empty file.
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
            raise DataError(
                f"{path}:{line}: the field {error} is missing",
                field=f"{path.name}:{line}:{error.args[0]}",
                code="missing",
            ) from error
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"{path}:{line}: malformed row: {error}", field=f"{path.name}:{line}", code="malformed"
            ) from error
    return made


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not str.splitlines: it also breaks at U+2028 and its like, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: not valid JSON ({_reason(error)}); one object a line",
                field=f"{path.name}:{number}",
                code="json",
            ) from error


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    line, counted, position = 1, 0, text.index("[") + 1
    expect_value = False
    while True:
        while position < len(text) and text[position].isspace():
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and not expect_value:
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{line}: not valid JSON ({_reason(error)})", field=f"{path.name}:{line}", code="json"
            ) from error
        yield line, value
        while position < len(text) and text[position].isspace():
            position += 1
        expect_value = text[position : position + 1] == ","
        if expect_value:
            position += 1
        elif text[position : position + 1] != "]":
            raise DataError(
                f"{path}:{line}: not valid JSON (the array is not closed, or a comma is missing)",
                field=f"{path.name}:{line}",
                code="unclosed",
            )
    if text[position + 1 :].strip():
        raise DataError(
            f"{path}:{line}: not valid JSON (text after the array's end)", field=f"{path.name}:{line}", code="trailing"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number has too many digits"


def _kind(value: object) -> str:
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "an array"}
    return "null" if value is None else names[type(value)]
