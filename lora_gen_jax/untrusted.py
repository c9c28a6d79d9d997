"""What files from anywhere may say: metadata against a schema, tensors against names, shapes and numbers.

In: a path, a parsed object or arrays, and what is expected of them. Out: the same, safe to work with, or an error of
the caller's kind that names the file's field.

A schema is {field: type}, with types as configs name them: `int`, `str | None`, `dict[str, str]`, `Literal["a"]`,
`Annotated[int, 1, 10]` for a number from 1 to 10.
"""

import hashlib
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np

from lora_gen_jax.errors import CheckpointError, LoraGenError

Kind = type[LoraGenError]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as schemas name them; an integer counts as a float, a list as a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, inner[0]) and inner[1] <= value <= inner[2]
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin in (tuple, list):
        # Of as many as one likes, all of one type.
        return isinstance(value, tuple | list) and all(fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        number = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        return number and (isinstance(value, Integral) or math.isfinite(value))
    return isinstance(value, hint)


def wanted(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{wanted(inner[0])} from {inner[1]} to {inner[2]}"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(one) for one in inner)
    if origin is tuple:
        return f"a tuple, each entry {wanted(inner[0])}"
    if origin is list:
        return f"a list, each entry {wanted(inner[0])}"
    if origin is dict:
        return f"an object, each value {wanted(inner[1])}"
    named = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text", Path: "a Path"}
    return named.get(hint, "an object" if hint is dict else "a list" if hint is list else "None")


def parse_json(text: str) -> Any:
    """JSON; ValueError for what is none, and for NaN, half of a surrogate pair or a number that no float holds."""
    try:
        value = json.loads(text, parse_constant=_no_number, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _whole(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def read_object(path: Any, kind: Kind, remedy: str | None = None) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: of the file, or what behaves as one.
        kind: of error, with code "unreadable" or "type".
        remedy: what to do about a file that cannot be read.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise kind(f"{path} cannot be read: {reason}", field=path.name, code="unreadable", remedy=remedy) from error
    if not isinstance(value, dict):
        problem = f"{path} holds {type(value).__name__}, not a JSON object"
        raise kind(problem, field=path.name, code="type", remedy=remedy)
    return value


def check_fields(values: Mapping[str, Any], schema: Mapping[str, Any], file: str, kind: Kind) -> None:
    """Raises `kind`, code "missing" or "type", for a field that does not fit the schema.

    Fields that are not in the schema are left to newer versions; those that may be None may be left out.
    """
    for name, hint in schema.items():
        if not fits(values.get(name), hint):
            code = "type" if name in values else "missing"
            said = f"{name} is {shown(values[name])}" if name in values else f"{name} is missing"
            raise kind(f"{file}: {said}; it must be {wanted(hint)}", field=f"{file}:{name}", code=code)


def shown(value: Any) -> str:
    """A value as messages quote it: short, whatever it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def reason_of(error: BaseException) -> str:
    """What an error of another library says, in a line: arrays' storage writes pages."""
    lines = str(error).strip().splitlines()
    first = lines[0][:200] if lines else ""
    return f"{first} ({type(error).__name__})" if first else type(error).__name__


def finite(value: Any) -> bool:
    """Whether an array, of any type and on any device, holds only numbers."""
    array = np.asarray(value)
    return array.dtype.kind in "iub" or bool(np.isfinite(array).all())


def check_tensors(
    found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]] | None, file: str, kind: Kind = CheckpointError
) -> None:
    """Raises `kind` unless tensors are those expected and no others, in these shapes, and finite.

    Args:
        found: arrays by name.
        expected: shapes; None where the names and shapes are not known.
        file: that they are of.
        kind: of error, with code "missing", "unknown", "shape" or "not finite".
    """
    shapes = {name: tuple(value.shape) for name, value in found.items()} if expected is None else expected
    for name in sorted(found.keys() | shapes.keys()):
        at = f"{file}:{name}"
        if name not in found:
            raise kind(f"{file} lacks the tensor {name}", field=at, code="missing")
        if name not in shapes:
            raise kind(f"{file} holds a tensor {name}, which this model does not have", field=at, code="unknown")
        if (shape := tuple(found[name].shape)) != tuple(shapes[name]):
            problem = f"{file}: tensor {name} has the shape {shape}, not {tuple(shapes[name])}"
            raise kind(problem, field=at, code="shape")
        if not finite(found[name]):
            raise kind(f"{file}: tensor {name} holds values that are not numbers", field=at, code="not finite")


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves with their keys joined by slashes."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def digest_of(value: Any) -> str:
    """SHA-256 of an array's type, shape and bytes; of bytes; of any other value as canonical JSON."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if hasattr(value, "dtype"):
        array = np.ascontiguousarray(value)
        return hashlib.sha256(f"{array.dtype} {np.shape(value)}\n".encode() + array.tobytes()).hexdigest()
    plain = json.loads(json.dumps(value, default=str))  # as it will be read again: keys are texts, tuples are lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digests(found: Mapping[str, str], recorded: Mapping[str, str], file: str) -> None:
    """Raises CheckpointError, code "damaged", unless just what was recorded is there, and the same."""
    differ: Iterable[str] = sorted(n for n in found.keys() | recorded.keys() if found.get(n) != recorded.get(n))
    for name in differ:
        raise CheckpointError(
            f"{file}: {name} is not what was written (its SHA-256 differs)", field=name, code="damaged"
        )
