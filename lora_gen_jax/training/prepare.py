"""What a run does before its first step: tasks, samplers, checks of shapes, and the work directory.

In: a config and the pair of models. Out: samplers of batches and a directory with config.json; bad input is an
error before anything is written.
"""

import ctypes
import json
import sys
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import difference, from_json, to_json
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.pipeline import GroupSampler
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import CheckpointError, ConfigError
from lora_gen_jax.models import Pair
from lora_gen_jax.sharding import spec


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


def check_shapes(config: Config, pair: Pair, mesh: Mesh) -> None:
    """Batches must divide among the devices, and every token have a position of its own.

    Raises:
        ConfigError: naming the field. A position beyond a model's table would read its last row, silently.
    """
    d, layers = config.data, pair.edge.config.num_layers
    rows, devices = d.prompts_per_step // d.prompts_per_row, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % devices:
        raise ConfigError(
            f"data.prompts_per_step / data.prompts_per_row = {rows} rows cannot be split evenly over {devices} devices:"
            " choose a multiple"
        )
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
                f"{field} lets a sequence be {tokens} tokens long, but the model has {model.max_positions} positions:"
                f" lower {field}"
            )


def training_tasks(config: Config) -> list[Task]:
    """The tasks that a config trains on."""
    d = config.data
    return list(load_tasks(d.tasks, d.dir, d.tfds_dir, d.files).values())


def make_sampler(config: Config, pair: Pair, tasks: list[Task], split: str) -> GroupSampler | None:
    """Groups of one split; None where no task has validation examples."""
    if split == "validation" and (config.train.validation_batches == 0 or not any(t.validation for t in tasks)):
        return None
    layers = pair.edge.config.num_layers
    return GroupSampler(tasks, pair.cloud.encoder, pair.edge.encoder, config.data, layers, split)


def prepare_directory(config: Config) -> None:
    """Writes config.json, or compares with the one there.

    Raises:
        CheckpointError: when the directory belongs to a run with another config.
    """
    directory, new = config.directory, to_json(config)
    path = directory / "config.json"
    if path.exists():
        # Fields that were added since that run was started count as their defaults.
        old = to_json(from_json(json.loads(path.read_text(encoding="utf-8"))))
        lines = difference(old, new)
        if lines:
            raise CheckpointError(
                f"{directory} holds a run with another config; choose another --workdir, or undo:\n  "
                + "\n  ".join(lines)
            )
        return
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


def place(batch: Any, mesh: Mesh) -> Any:
    """NumPy arrays of this process as global arrays whose rows are split over `data` and `fsdp`."""
    sharding = NamedSharding(mesh, spec("batch"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
