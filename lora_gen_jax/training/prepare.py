"""What a run does before its first step: tasks, samplers, checks of shapes, and the work directory.

In: a config and the pair of models. Out: samplers of batches and a directory with config.json; bad input is an
error before anything is written.
"""

import ctypes
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from lora_gen_jax import files
from lora_gen_jax.config import Config
from lora_gen_jax.config_file import difference, from_json, to_json
from lora_gen_jax.data.groups import GroupSampler
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.mixture import epoch_rows, named_tasks, narrowed
from lora_gen_jax.data.pipeline import Shard
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import CheckpointError, ConfigError, DataError
from lora_gen_jax.methods.registry import trained_method
from lora_gen_jax.models import Pair
from lora_gen_jax.sharding import spec
from lora_gen_jax.training import distributed
from lora_gen_jax.training.bucket import is_bucket, location, remote_errors, writing
from lora_gen_jax.untrusted import read_object, reason_of


def keep_freed_memory() -> None:
    """On a CPU with glibc: memory that a step frees stays with the process for the next step.

    By default the C library returns gigabytes to the system after every step and the kernel clears them page by page
    for the next one, a third of the processor time of a step of this size.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


# Names of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def check_rows(config: Config, mesh: Mesh) -> None:
    """The rows of a batch must divide among the devices that rows are split over.

    Raises ConfigError when they do not.
    """
    d, devices = config.data, mesh.shape["data"] * mesh.shape["fsdp"]
    rows = d.prompts_per_step // d.prompts_per_row
    if rows % devices:
        raise ConfigError(
            f"data.prompts_per_step / data.prompts_per_row = {rows} rows cannot be split evenly over mesh data·fsdp ="
            f" {devices} devices",
            field="data.prompts_per_step",
            remedy=f"take a multiple of {devices * d.prompts_per_row} prompts, or let devices share a row"
            " with --mesh.model",
        )


def check_same_rows(rows: dict[str, str]) -> None:
    """Every process makes its part of a batch by itself, so all must have the same tasks.

    Args:
        rows: as `data.tasks.contents`.

    Raises:
        DataError: naming the processes whose tasks are others.
    """
    if others := distributed.differing(repr(sorted(rows.items()))):
        problem = f"the tasks of process {', '.join(map(str, others))} are not those of process 0"
        remedy = "put the same files on all machines (data.dir, data.files, data.tfds_dir)"
        raise DataError(problem, field="data", remedy=remedy)


def check_shapes(config: Config, pair: Pair) -> None:
    """Every token must have a position of its own.

    Raises ConfigError naming the field. A position beyond a model's table would read its last row, silently.
    """
    d, layers = config.data, pair.edge.config.num_layers
    # The other prompts of a row have a token each at least, and their meta tokens.
    longest = d.cloud_length - (d.prompts_per_row - 1) * (layers + 1)
    for field, tokens, model in (
        ("data.cloud_length", longest, pair.cloud.config),
        # Behind a prompt, a row's queries go on where it ends.
        ("data.edge_length", d.edge_length if d.edge_reads_prompt else 0, pair.edge.config),
        ("data.query_length", d.query_length, pair.edge.config),
    ):
        if tokens > model.max_positions:
            raise ConfigError(
                f"{field} lets a sequence be {tokens} tokens long, but the model has {model.max_positions} positions",
                field=field,
                remedy=f"lower {field}",
            )


def with_steps(config: Config, tasks: Sequence[Task] | None = None) -> Config:
    """The config with the number of steps that its epochs take; as it is where it has none.

    Args:
        config: given, or one that was through this already.
        tasks: as `training_tasks` gives them; left out, they are loaded.

    Raises:
        LoraGenError: as `training_tasks` and `epoch_rows`.
    """
    d, t = config.data, config.train
    if t.epochs is None:
        return config
    queries = t.epochs * epoch_rows(d, training_tasks(config) if tasks is None else tasks)
    steps = max(1, math.ceil(queries / (d.prompts_per_step * d.queries_per_prompt)))
    return dataclasses.replace(config, train=dataclasses.replace(t, steps=steps))


def training_tasks(config: Config) -> list[Task]:
    """The tasks that a config trains on.

    Raises LoraGenError for unknown tasks, or those that the method cannot take.
    """
    d, choose = config.data, trained_method(config.method).choose_tasks
    tasks = list(load_tasks(d.tasks, d.dir, d.tfds_dir, d.files).values())
    if choose is None:
        return tasks
    named_tasks(d, tasks)  # what is wrong with the names of all tasks would not be noticed among fewer
    return choose(config, tasks)


def make_sampler(config: Config, pair: Pair, tasks: list[Task], split: str) -> GroupSampler | None:
    """Groups of one split; None where no task has validation examples."""
    if split == "validation" and (config.train.validation_batches == 0 or not any(t.validation for t in tasks)):
        return None
    data, layers = config.data, pair.edge.config.num_layers
    if trained_method(config.method).choose_tasks is not None:
        data = narrowed(data, tasks)
    return GroupSampler(tasks, pair.cloud.encoder, pair.edge.encoder, data, layers, split)


def prepare_directory(config: Config) -> None:
    """Writes config.json, or compares with the one there; every process looks, process 0 writes.

    With checkpoints in a bucket there is one there, too, which every process looks at; the work directory may then be
    each machine's own.

    Raises:
        CheckpointError: when the directory, or the bucket, belongs to a run with another config.
        ConfigError: when the processes do not share the directory.
        OutputError: when it cannot be written.
    """
    new, shared = to_json(config), location(config.saved) / "config.json"
    if jax.process_index() == 0:
        _begin(config.directory / "config.json", new)
        if config.bucket is not None:
            _compare(config.directory / "config.json", new)
            _begin_in_bucket(shared, new)
    if jax.process_count() > 1:
        distributed.barrier()
        if not shared.exists():
            problem = f"process 0 wrote {shared}, which process {jax.process_index()} does not see"
            raise ConfigError(problem, field="--workdir", remedy=SHARED)
    _compare(shared, new)


def _begin(path: Path, new: dict[str, Any]) -> None:
    if not path.exists():
        with files.writing(path.parent, "--workdir"):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(new, indent=2) + "\n", "--workdir")


def _begin_in_bucket(path: Any, new: dict[str, Any]) -> None:
    with writing(path):
        if not path.exists():
            path.write_text(json.dumps(new, indent=2) + "\n")


SHARED = "set --workdir to a directory that all processes share, or --bucket to a bucket for the checkpoints"


def _compare(path: Any, new: dict[str, Any]) -> None:
    remedy = "Delete that file, and go on with the same config"
    try:
        saved = to_json(from_json(read_object(path, CheckpointError, remedy)))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}", field="config.json", code="malformed", remedy=remedy) from error
    except remote_errors(path) as error:
        raise CheckpointError(
            f"{path} cannot be read: {reason_of(error)}", field="config.json", code="unreadable", remedy=remedy
        ) from error
    # Fields that were added since that run was started count as their defaults.
    if lines := difference(saved, new):
        other = "--bucket" if is_bucket(path) else "--workdir"
        problem = f"{path.parent} holds a run with another config"
        remedy = f"choose another {other}, or undo:\n  " + "\n  ".join(lines)
        raise CheckpointError(problem, field=other, code="another config", remedy=remedy)


def shard_of(config: Config, mesh: Mesh) -> Shard:
    """The rows of every batch that this process's devices hold; on a TPU pod they need not lie side by side."""
    mine, parts = _parts(mesh)
    count = config.data.prompts_per_step // config.data.prompts_per_row // parts
    return Shard(tuple(row for part in mine for row in range(part * count, (part + 1) * count)))


def place(batch: Any, mesh: Mesh) -> Any:
    """NumPy arrays of this process as global arrays whose rows are split over `data` and `fsdp`."""
    sharding, (mine, parts) = NamedSharding(mesh, spec("batch")), _parts(mesh)

    def whole(x: Any) -> jax.Array:
        shape = (x.shape[0] * parts // len(mine), *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(whole, batch)


def _parts(mesh: Mesh) -> tuple[list[int], int]:
    # Of the equal parts that a batch's rows are split into: those on this process's devices, and how many there are.
    grid = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    here = jax.process_index()
    return [i for i, devices in enumerate(grid) if any(d.process_index == here for d in devices)], len(grid)
