"""A trained generator as two small files, and the generators that are shipped with the package.

In: a checkpoint. Out: a directory with `generator.safetensors` (parameters and batch statistics) and `generator.json`
(config, step, fingerprints, versions), which every ``--checkpoint`` accepts. The optimiser's state stays behind.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then returns)
import numpy as np
import safetensors
import safetensors.numpy

from lora_gen_jax.config_file import from_json, to_json
from lora_gen_jax.errors import CheckpointError
from lora_gen_jax.files import complete_directory, writing

TENSORS, READABLE = "generator.safetensors", "generator.json"
_PACKAGE = Path(__file__).parents[1]
# By the name of the config that a generator belongs to; ``--checkpoint`` takes the names, too.
SHIPPED = {
    "quickstart": _PACKAGE / "pocket" / "generator",
    "smollm2_tasks": _PACKAGE / "smollm2" / "tasks",
    "smollm2_135m": _PACKAGE / "smollm2" / "generator",
}
# Where no checkpoint is named.
DEFAULT = SHIPPED["smollm2_tasks"]


def save_portable(loaded: Any, directory: Path, dtype: Any) -> None:
    """Writes the directory, complete or not at all.

    Args:
        loaded: `lora_gen_jax.training.checkpoint.Loaded`.
        directory: where to write; must not exist, or be empty.
        dtype: of the stored parameters; batch statistics stay in fp32.

    Raises:
        OutputError: when it exists and is not empty, or cannot be written.
    """
    tensors = {}
    for name, value in flatten(loaded.variables):
        stored = np.asarray(value)
        tensors[name] = np.ascontiguousarray(stored.astype(dtype) if name.startswith("params/") else stored)
    # Where the run was has no meaning elsewhere.
    config: dict[str, Any] = to_json(loaded.config) | {"workdir": None, "bucket": None}
    config["data"] |= {"dir": None, "tfds_dir": None, "files": []}
    readable = {
        "step": loaded.step,
        "config": config,
        "fingerprints": loaded.fingerprints,
        "versions": loaded.versions,
    }
    with complete_directory(directory) as temporary, writing(directory):
        (temporary / TENSORS).write_bytes(safetensors.numpy.save(tensors))
        (temporary / READABLE).write_text(json.dumps(readable, indent=2) + "\n", encoding="utf-8")


def load_portable(directory: Path) -> dict[str, Any]:
    """The fields of a `Loaded`, parameters in fp32.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """
    try:
        with safetensors.safe_open(directory / TENSORS, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        readable = json.loads((directory / READABLE).read_text(encoding="utf-8"))
        return {
            "step": int(readable["step"]),
            "variables": unflatten({name: jnp.asarray(x.astype(np.float32)) for name, x in tensors.items()}),
            "config": from_json(readable["config"]),
            "fingerprints": readable["fingerprints"],
            "versions": readable["versions"],
            "path": directory,
        }
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"generator {directory} is damaged or incomplete: {error}", field="--checkpoint", code="damaged"
        ) from error


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves with their keys joined by slashes."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from leaves named as `flatten` names them."""
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, value in leaves.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
