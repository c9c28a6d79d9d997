"""What happens to a file: accidents, and changes that only an author makes. In: bytes. Out: other bytes."""

import copy
import json
import random
import struct
import tempfile
from typing import Any

WEIRD: list[Any] = [None, True, -1, 0, 1, 2**32 - 1, 2**63, 10**40, 1e308, float("nan"), "", "x", "é" * 5000, "\ud800"]
WEIRD += [[], {}, [[]], {"": None}, "../../x", "gs://elsewhere/x"]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One accident: a bit, a few bytes, a hole, the end cut off, something put in or doubled."""
    stored, at = bytearray(data), rng.randrange(max(1, len(data)))
    length = min(rng.choice([1, 2, 8, 64, 512]), len(data))
    how = rng.randrange(6)
    if how <= 1:
        stored[at] ^= 1 << rng.randrange(8)
    elif how == 2:
        stored[at : at + length] = rng.randbytes(len(stored[at : at + length]))
    elif how == 3:
        stored[at : at + length] = bytes(len(stored[at : at + length]))
    elif how == 4:
        del stored[at : None if rng.random() < 0.5 else at + length]
    else:
        stored[at:at] = rng.choice([stored[at : at + length], b"\xff" * length, b"[" * 5000])
    return bytes(stored)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """One change somewhere in parsed JSON: a value replaced, a key gone, renamed or new, or a hundred levels more."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        inside = [(one, key) for one in level for key in (one if isinstance(one, dict) else range(len(one)))]
        places += inside
        level = [one[key] for one, key in inside if isinstance(one[key], dict | list)]
    if not places or rng.random() < 0.02:
        return rng.choice(WEIRD)
    parent, key = rng.choice(places)
    how = rng.random()
    if how < 0.6:
        parent[key] = rng.choice(WEIRD)
    elif how < 0.7 and isinstance(parent[key], int | float):
        parent[key] = parent[key] * rng.choice([-1, 2, 10, 10**6])
    elif how < 0.8:
        del parent[key]
    elif how < 0.9 and isinstance(parent, dict):
        parent[f"{key}2"] = parent.pop(key)
    else:
        parent[key] = json.loads("[" * 200 + "]" * 200)
    return value


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """An author's change of a JSON file."""
    if rng.random() < 0.02:
        return b"[" * 100_000
    return json.dumps(mutate_value(json.loads(data), rng)).encode()


def mutate_jsonl(data: bytes, rng: random.Random) -> bytes:
    """An author's change of one line."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """An author's change of the header, or of the tensors: NaN, other shapes and types, missing and renamed ones."""
    from safetensors.numpy import load, save

    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.5:
        changed = json.dumps(mutate_value(header, rng)).encode()
        return struct.pack("<Q", len(changed)) + changed + data[8 + length :]
    tensors = load(data)
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    how = rng.randrange(6)
    if how == 0:
        tensors[rng.choice([f"{name}2", "", "params", name.replace("/", "."), "x" * 5000])] = value
    elif how == 1:
        tensors[name] = value.reshape(-1)
    elif how == 2:
        tensors[name] = value[:1] if value.ndim else value
    elif how == 3:
        tensors[name] = value.astype(rng.choice(["float64", "int32", "float16", "bool"]))
    elif how == 4 and value.dtype.kind != "u":
        value = value.astype("float32")
        value.reshape(-1)[rng.randrange(max(1, value.size))] = rng.choice([float("nan"), float("inf"), 1e30])
        tensors[name] = value
    return save(tensors, header.get("__metadata__"))


def mutate_gguf(data: bytes, rng: random.Random) -> bytes:
    """An author's change of a header: another type, or an extreme value; sizes and counts among them."""
    import gguf

    stored = bytearray(data)
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        fields = [field for name, field in gguf.GGUFReader(file.name).fields.items() if not name.startswith("GGUF.")]
    field = rng.choice(fields)
    at = field.offset + 8 + len(field.name)  # of its type, which its value follows
    if rng.random() < 0.3:
        stored[at : at + 4] = struct.pack("<I", rng.randrange(14))
    else:
        size = rng.choice([1, 2, 4, 8])
        stored[at + 4 : at + 4 + size] = rng.choice([b"\xff", b"\x00", b"\x7f"]) * size
    if rng.random() < 0.2:  # how many tensors and fields there are
        place = rng.choice([8, 16])
        stored[place : place + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63]))
    return bytes(stored)


AUTHORS = {"gguf": mutate_gguf, "json": mutate_json, "jsonl": mutate_jsonl, "safetensors": mutate_safetensors}
