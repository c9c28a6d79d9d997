"""What a specialization's files must be like, before anything of them is used: they may come from anywhere.

In: paths. Out: tensors, metadata and readable fields that are safe to work with, or an error that says what is wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from lora_gen_jax.errors import CheckpointError
from lora_gen_jax.untrusted import check_fields, parse_json, read_object, reason_of

LARGEST = 64 * 2**20
"""Bytes of any file but one with factors. Gates of a thousand layers and experts fit many times over."""
SPARSE, DENSE = frozenset({"index", "weight"}), frozenset({"weight", "scale"})
FLOAT = ("F16", "F32")
READABLE_SCHEMA = {"checkpoint": str | None, "versions": dict[str, str], "sha256": dict[str, str] | None}
REFINED_SCHEMA = {"kind": str, **dict.fromkeys(("examples", "steps", "loss_before", "loss_after"), float)}
_TYPES = {"index": ("U8", "U16", "U32"), "scale": FLOAT}
_AXES = {"index": 2, "weight": 2, "scale": 1}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong in this block is damage to a file of the specialization in the directory around it.

    Raises:
        CheckpointError: naming the file, and its key where that is known.
    """
    place, remedy = f"specialization {path.parent} is damaged", "make it again"
    try:
        yield
    except CheckpointError as error:
        raise error.within(place, remedy=remedy) from error
    except KeyError as error:
        key = error.args[0]
        raise CheckpointError(
            f"{place}: {path.name} lacks {key!r}", field=f"{path.name}:{key}", remedy=remedy
        ) from error
    except (OSError, TypeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{place}: {path.name}: {reason_of(error)}", field=path.name, remedy=remedy) from error


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata. Names, types and shapes come from the header, and are checked before any tensor is read.

    Raises:
        CheckpointError: for tensors that are neither gates, with factors or without, nor factors of direct generation.
        safetensors.SafetensorError, OSError: as the library, for a file that is none or is truncated.
    """
    with safetensors.safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        kinds = {name: file.get_slice(name).get_dtype() for name in names}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        gates = _names_of_gates(path, names)
        if gates == set(names):
            check_size(path)
        dense = ("I8",) if gates == DENSE else FLOAT
        for name in names:
            allowed = dense if name == "weight" else _TYPES.get(name, FLOAT)
            if kinds[name] not in allowed:
                raise CheckpointError(
                    f"{name} is of type {kinds[name]}, which is none of {', '.join(allowed)}",
                    field=f"{path.name}:{name}",
                )
            if len(shapes[name]) != _AXES.get(name, 3) or 0 in shapes[name]:
                raise CheckpointError(f"{name} has the shape {shapes[name]}", field=f"{path.name}:{name}")
        if gates == SPARSE and shapes["index"] != shapes["weight"]:
            raise CheckpointError(
                f"index and weight differ in shape: {shapes['index']}, {shapes['weight']}", field=f"{path.name}:weight"
            )
        if len({shape[0] for shape in shapes.values()}) > 1:
            raise CheckpointError("the factors are of different numbers of layers", field="layers")
        tensors = {name: file.get_tensor(name) for name in names}
        metadata = file.metadata() or {}
    if gates == SPARSE:
        _check_gates(tensors["index"], tensors["weight"], path.name)
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise CheckpointError(f"{name} holds values that are not numbers", field=f"{path.name}:{name}")
    return tensors, metadata


def _names_of_gates(path: Path, names: list[str]) -> frozenset[str]:
    """`SPARSE`, `DENSE`, or nothing for direct generation; CheckpointError for any other set of tensors."""
    gates = frozenset(name for name in names if name in _AXES)
    factors = {name for name in names if name.count(".") == 1 and name[-2:] in (".a", ".b")}
    pairs = {f"{name[:-2]}.{x}" for name in factors for x in "ab"}
    if gates not in (SPARSE, DENSE, frozenset()) or (gates and gates | pairs != set(names)):
        held = ", ".join(sorted(names))
        raise CheckpointError(
            f"{path.name} holds {held} instead of index and weight, or weight and scale", field=path.name
        )
    if not gates and not (names and len(factors) == len(names)):
        raise CheckpointError(f"{path.name} holds neither gates (index and weight) nor factors", field=path.name)
    return gates


def _check_gates(index_LK: np.ndarray, weight_LK: np.ndarray, file: str) -> None:
    """Raises CheckpointError, naming the layer, unless every layer's gates could have come from a router."""
    index, weight = (index_LK, f"{file}:index"), (weight_LK, f"{file}:weight")
    number_LK = np.isfinite(weight_LK) & (weight_LK >= 0)
    _refuse(~np.all(number_LK, axis=1), *weight, "gates must be numbers of at least 0")
    total_L = weight_LK.sum(axis=1, dtype=np.float64)
    if weight_LK.shape[1] == 1:  # the one gate keeps its probability (`keep_top_k`)
        _refuse((total_L <= 0) | (total_L > 1.001), *weight, "a single gate must be above 0 and at most 1")
    else:
        _refuse(np.abs(total_L - 1) > 1e-3, weight_LK, f"{file}:sum of weight", "gates must sum to 1")
    ordered_LK = np.sort(index_LK, axis=1)
    _refuse(np.any(ordered_LK[:, 1:] == ordered_LK[:, :-1], axis=1), *index, "each expert may appear once")


def _refuse(wrong_L: np.ndarray, values_LK: np.ndarray, field: str, rule: str) -> None:
    if wrong_L.any():
        layer = int(np.argmax(wrong_L))
        more = " …" if values_LK.shape[1] > 8 else ""
        values = values_LK[layer, :8].tolist()
        raise CheckpointError(f"layer {layer} has {values}{more}: {rule}", field=f"{field}.{layer}")


def read_readable(path: Path) -> tuple[str | None, dict[str, str], dict[str, str]]:
    """(checkpoint, versions, {file: SHA-256}, which older versions did not write).

    Raises:
        CheckpointError: when the file says something else.
    """
    check_size(path)
    readable = read_object(path, CheckpointError)
    if "checkpoint" not in readable:
        raise CheckpointError(f"{path.name} lacks checkpoint", field=f"{path.name}:checkpoint", code="missing")
    check_fields(readable, READABLE_SCHEMA, path.name, CheckpointError)
    return readable["checkpoint"], readable["versions"], readable.get("sha256") or {}


def read_refined(text: str | None, field: str) -> dict[str, Any] | None:
    """How a specialization was refined, as the metadata have it under `field`.

    Raises:
        CheckpointError, ValueError: when they say something else.
    """
    if text is None:
        return None
    refined = parse_json(text)
    if not isinstance(refined, dict):
        raise CheckpointError('"refined" must be an object', field=field, code="type")
    try:
        check_fields(refined, REFINED_SCHEMA, "refined", CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(error.problem, field=field, code=error.code) from error
    return refined


def check_size(path: Path) -> None:
    """Raises CheckpointError for a file larger than `LARGEST`."""
    size = path.stat().st_size
    if size > LARGEST:
        raise CheckpointError(
            f"{path.name} has {size} bytes, more than the {LARGEST} that any such file needs", field=f"{path.name}:size"
        )
