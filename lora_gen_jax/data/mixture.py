"""The mixture of sources that prompts are drawn from, and what an epoch of it is.

In: tasks and a `DataConfig`. Out: the chance of every task, the number of training rows, and the tasks' names checked.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lora_gen_jax.config import DataConfig
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import ConfigError


def chances(config: DataConfig, tasks: Sequence[Task], split: str) -> np.ndarray:
    """The chance of every task to be drawn; within a source it goes by the number of rows.

    Raises ConfigError as `named_tasks`, and where no task with rows of the split has a positive weight.
    """
    weights, sizes = named_tasks(config, tasks), dict[str, int]()
    for task in tasks:
        sizes[task.source] = sizes.get(task.source, 0) + len(getattr(task, split))
    # Of a source, by its rows again; else all sources are alike, whatever they hold.
    shared = {source: 1 if config.mixture == "size" else max(1, size) for source, size in sizes.items()}
    chance = np.array([weights[t.source] * len(getattr(t, split)) / shared[t.source] for t in tasks])
    if not chance.any():
        problem = f"data.source_weights gives every source with {split} examples the weight 0"
        remedy = "leave one positive" + ", or set train.validation_batches to 0" * (split == "validation")
        raise ConfigError(problem, field="data.source_weights", code="zero", remedy=remedy)
    return chance / chance.sum()


def epoch_rows(config: DataConfig, tasks: Sequence[Task]) -> int:
    """Training rows that can be drawn: an epoch is as many queries. Raises ConfigError as `chances`."""
    drawn = chances(config, tasks, "train") > 0
    return sum(len(task.train) for task, yes in zip(tasks, drawn, strict=True) if yes)


def named_tasks(config: DataConfig, tasks: Sequence[Task]) -> Mapping[str, float]:
    """Weight of every source of the tasks.

    Raises:
        ConfigError: for a weight that is malformed or of an unknown source, or an unknown knowledge task.
    """
    sources = {task.source for task in tasks}
    for name in config.knowledge_tasks:
        if name not in sources | {task.name for task in tasks}:
            problem = f"data.knowledge_tasks names {name!r}, which is neither a task trained on nor a source"
            raise ConfigError(problem, field="data.knowledge_tasks")
    return source_weights(config.source_weights, sources)


def narrowed(config: DataConfig, tasks: Sequence[Task]) -> DataConfig:
    """The config without names of other tasks and sources than these."""
    sources, names = {task.source for task in tasks}, {task.name for task in tasks}
    return dataclasses.replace(
        config,
        source_weights=tuple(pair for pair in config.source_weights if pair.partition("=")[0] in sources),
        knowledge_tasks=tuple(name for name in config.knowledge_tasks if name in sources | names),
    )


def source_weights(pairs: Sequence[str], sources: set[str]) -> Mapping[str, float]:
    """Weight of every source: 1, or what ``name=weight`` says.

    Raises ConfigError for a malformed pair, an unknown source or weights that are all zero.
    """
    weights = dict.fromkeys(sorted(sources), 1.0)
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if not 0 <= weight < math.inf:
            problem, remedy = f"data.source_weights has {pair!r}", "write name=weight with a weight of 0 or more"
            raise ConfigError(problem, field="data.source_weights", code="malformed", remedy=remedy)
        if name not in sources:
            problem = f"data.source_weights names {name!r}; the sources are {', '.join(sorted(sources))}"
            raise ConfigError(problem, field="data.source_weights", code="unknown")
        weights[name] = weight
    if not any(weights.values()):
        problem = "data.source_weights gives every source the weight 0"
        raise ConfigError(problem, field="data.source_weights", code="zero", remedy="leave one positive")
    return weights
