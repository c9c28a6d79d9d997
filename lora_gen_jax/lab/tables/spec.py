"""What a set of tables compares: one base config, and by name what each run changes in it.

In: a Python file with ``get_tables()``. Out: `Tables`, and the checked `Config` of every run and seed.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_gen_jax.config import Config
from lora_gen_jax.config_check import check
from lora_gen_jax.config_file import made_by
from lora_gen_jax.errors import ConfigError

# What a run changes: values by field, those of a part in a mapping of their own:
# {"method": "lora", "generator": {"rank": 8}}.
Change = Mapping[str, Any]
# Scored without training: the base model alone and with the shots in its context.
UNTRAINED, UNTRAINED_METHODS = "base", ("base", "icl")
AGENT = "agent"
# Scored with every number of shots; all others with the largest alone.
MANY_SHOTS = ("lora_gen",)
AGENT_METHODS = ("base_with_tools", "lora_with_tools", "lora", "lora_gen_untrained", "lora_gen")


@dataclasses.dataclass(frozen=True)
class Tables:
    """What is trained and scored for the tables.

    Attributes:
        base: what all runs share; every run lies in a directory of its own inside `base.directory`.
        runs: what each changes. The names are rows: of methods, in this order, and of variants of lora_gen (experts_N,
            cv_N, gumbel_top_k, gumbel, direct), which have tables of their own.
        agent: of the agent table; left out, there is none.
        agent_rows: training rows that are generated for each embedded tool set.
        agent_methods: rows of the agent table.
        seeds: of parameters, data order and choice of shots; a mean and its error are over them.
        shots: numbers of shots that are scored.
    """

    base: Config
    runs: Mapping[str, Change]
    agent: Config | None = None
    agent_rows: int = 96
    agent_methods: tuple[str, ...] = AGENT_METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    shots: tuple[int, ...] = (1, 3, 5)

    @property
    def directory(self) -> Path:
        """Everything that is written."""
        return self.base.directory

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that runs, once a seed."""
        return (UNTRAINED, *self.runs, *((AGENT,) if self.agent is not None else ()))


def is_method_row(run: str, method: str) -> bool:
    """Whether a run stands for its method in the tables that compare methods: all but the variants of LoRA-Gen."""
    return run not in (UNTRAINED, AGENT) and (method != "lora_gen" or run == "lora_gen")


def reads_prompt(prompt: int, queries: int, positions: int) -> Change:
    """What `data` has to be for a method whose edge model reads the prompt before the queries, as it was published.

    Where a row cannot hold both, queries give way, and then shots.

    Args:
        prompt, queries: tokens that a row has room for.
        positions: of the edge model, which a row must keep to.
    """
    return {"edge_reads_prompt": True, "edge_length": min(prompt + queries, positions)}


def read_tables(path: Path) -> Tables:
    """Runs a config file's ``get_tables()``; the file's name becomes the base config's where it gives none.

    Raises:
        ConfigError: when the file is missing, fails, or has no ``get_tables()`` that returns `Tables`.
    """
    return named(made_by(path, "get_tables", Tables), f"tables_{path.stem}")


def named(tables: Tables, name: str) -> Tables:
    """The tables, with a name where the base config has none; the agent's config takes the base's name."""
    base = tables.base if tables.base.name else dataclasses.replace(tables.base, name=name)
    agent = tables.agent
    if agent is not None and not agent.name:
        agent = dataclasses.replace(agent, name=f"{base.name}_{AGENT}")
    return dataclasses.replace(tables, base=base, agent=agent)


def changed(config: Any, change: Change, run: str) -> Any:
    """A config, or a part of one, with the values of a change.

    Raises:
        ConfigError: for a field that it does not have.
    """
    known, values = {field.name for field in dataclasses.fields(config)}, {}
    for field, value in change.items():
        if field not in known:
            raise ConfigError(
                f"run {run} changes {field!r}, which is not a field of {type(config).__name__}",
                field=f"runs.{run}.{field}",
            )
        nested = isinstance(value, Mapping)
        values[field] = changed(getattr(config, field), value, run) if nested else value
    return dataclasses.replace(config, **values)


def config_of(tables: Tables, run: str, seed: int) -> Config:
    """The config of one run with one seed, in its own directory.

    All methods of a seed are scored with the same shots, which the seed draws.

    Raises:
        ConfigError: naming the run, when the change or the result cannot work.
    """
    base = tables.agent if run == AGENT else tables.base
    assert base is not None
    change = tables.runs.get(run, {})
    shots = base.eval.shots if run == AGENT else max(tables.shots)
    place = dataclasses.replace(base, workdir=tables.directory).inside(f"{run}/seed-{seed}")
    seeded: Change = {
        "compare": (),
        "workdir": place.workdir,
        "bucket": place.bucket,
        "train": {"seed": seed},
        "eval": {"seed": seed, "shots": shots, "latency": False},
    }
    try:
        return check(changed(changed(base, change, run), seeded, run))
    except ConfigError as error:
        raise error.within(f"run {run}") from error
