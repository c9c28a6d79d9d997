"""A trained generator as two small files, and the generators that are shipped with the package.

In: a checkpoint. Out: a directory with `generator.safetensors` (parameters and batch statistics) and `generator.json`
(config, step, fingerprints, versions), which every ``--checkpoint`` accepts. The optimizer's state stays behind.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then returns)
import numpy as np
import safetensors
import safetensors.numpy

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import from_json, to_json
from lora_gen_jax.errors import CheckpointError, LoraGenError
from lora_gen_jax.files import complete_directory, writing
from lora_gen_jax.hub import name_of
from lora_gen_jax.untrusted import (
    check_digests,
    check_fields,
    check_tensors,
    digest_of,
    file_digest,
    flatten,
    read_object,
    reason_of,
)

TENSORS, READABLE = "generator.safetensors", "generator.json"
SCHEMA = {
    "step": Annotated[int, 0, 2**53],
    "config": dict,
    "fingerprints": dict[str, str],
    "versions": dict[str, str],
    "sha256": dict[str, str] | None,
}
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
        array = np.asarray(value)
        tensors[name] = np.ascontiguousarray(array.astype(dtype) if name.startswith("params/") else array)
    # Where the run was has no meaning elsewhere.
    config: dict[str, Any] = to_json(loaded.config) | {"workdir": None, "bucket": None}
    config["data"] |= {"dir": None, "tfds_dir": None, "files": []}
    readable: dict[str, Any] = {"step": loaded.step, "config": config}
    readable |= {"fingerprints": loaded.fingerprints, "versions": loaded.versions}
    stored = safetensors.numpy.save(tensors)
    readable["sha256"] = {TENSORS: digest_of(stored), READABLE: digest_of(readable)}
    with complete_directory(directory) as temporary, writing(directory):
        (temporary / TENSORS).write_bytes(stored)
        (temporary / READABLE).write_text(json.dumps(readable, indent=2) + "\n", encoding="utf-8")


def load_portable(directory: Path) -> dict[str, Any]:
    """The fields of a `Loaded`, parameters in fp32. Raises CheckpointError when a file is missing or damaged."""
    try:
        readable = read_object(directory / READABLE, CheckpointError)
        check_fields(readable, SCHEMA, READABLE, CheckpointError)
        recorded = readable.get("sha256") or {}
        if recorded:  # older versions wrote none
            rest = {name: value for name, value in readable.items() if name != "sha256"}
            found = {TENSORS: file_digest(directory / TENSORS), READABLE: digest_of(rest)}
            check_digests(found, recorded, directory.name)
        config = from_json(readable["config"])
        variables = unflatten(_tensors(directory / TENSORS))
        check_generator(variables, config, TENSORS)
        fields = {name: readable[name] for name in ("step", "fingerprints", "versions")}
        return fields | {"variables": variables, "config": config, "path": directory}
    except LoraGenError as error:
        reason, cause = error.problem, error
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        reason, cause = reason_of(error), error
    published = name_of(directory)
    problem = f"generator {published or directory} is damaged or incomplete: {reason}"
    remedy = None if published is None else f"Remove {directory} to download it again"
    raise CheckpointError(problem, field="--checkpoint", code="damaged", remedy=remedy) from cause


def _tensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        for name in names:
            if (kind := file.get_slice(name).get_dtype()) not in ("BF16", "F16", "F32", "F64"):
                raise CheckpointError(f"{path.name}: tensor {name} is of type {kind}", field=f"{path.name}:{name}")
        return {name: jnp.asarray(file.get_tensor(name).astype(np.float32)) for name in names}


def check_generator(variables: Any, config: Config, file: str) -> None:
    """What can be said of variables without the models: {"params", "batch_stats"} of finite numbers, one kind of head.

    Raises CheckpointError naming the tensor.
    """
    if not isinstance(variables, dict) or not isinstance(variables.get("params"), dict) or not variables["params"]:
        raise CheckpointError(f"{file} holds no params", field=f"{file}:params", code="missing")
    if config.method == "lora_gen":
        head, other = ("direct", "pool") if config.generator.generator == "direct" else ("pool", "direct")
        if not isinstance(variables["params"].get(head), dict) or other in variables["params"]:
            raise CheckpointError(
                f"{file} does not hold params/{head} as its only head", field=f"{file}:{head}", code="missing"
            )
    check_tensors(dict(flatten(variables)), None, file)


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from leaves named as `flatten` names them.

    Raises CheckpointError for a name that is none, or that another name goes on from.
    """
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, value in leaves.items():
        *path, last = name.split("/")
        node: Any = tree
        for key in path:
            node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node or not path or path[0] not in ("params", "batch_stats"):
            raise CheckpointError(f"a generator has no tensor {name}", field=name, code="unknown")
        node[last] = value
    return tree
