"""What a set of tables compares: one base config, and by name what each run changes in it.

In: a Python file with ``get_tables()``. Out: `Tables`, and the checked `Config` of every run and seed.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_gen_jax.config import Config
from lora_gen_jax.config_check import check
from lora_gen_jax.config_file import made_by, read_config
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.lab.agent.table import AGENT_ROWS
from lora_gen_jax.methods import registry
from lora_gen_jax.methods.method import Method

# What a run changes: values by field, those of a part in a mapping of their own:
# {"method": "lora", "generator": {"rank": 8}}.
Change = Mapping[str, Any]
# Scored without training: the base model on its own, and with the shots in its context.
UNTRAINED, UNTRAINED_METHODS = registry.BASE.key, (registry.BASE.key, registry.FULL_PROMPT.key)
AGENT = "agent"
# The run whose variants are the ablations; it is scored with every number of shots, all others with the largest.
GENERATOR = registry.GENERATOR.key


@dataclasses.dataclass(frozen=True)
class Tables:
    """What is trained and scored for the tables.

    Attributes:
        base: what all runs share; every run has a directory of its own inside `base.directory`.
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
    agent_methods: tuple[str, ...] = tuple(AGENT_ROWS)
    seeds: tuple[int, ...] = (0, 1, 2)
    shots: tuple[int, ...] = (1, 3, 5)

    @property
    def directory(self) -> Path:
        """Everything that is written."""
        return self.base.directory

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that runs, once per seed."""
        return (UNTRAINED, *self.runs, *((AGENT,) if self.agent is not None else ()))


def is_method_row(run: str, method: str) -> bool:
    """Whether a run stands for its method in the tables that compare methods: all but the variants of LoRA-Gen."""
    return run not in (UNTRAINED, AGENT) and (method != GENERATOR or run == GENERATOR)


def read_tables(path: Path) -> Tables:
    """Runs a config file's ``get_tables()``; configs without a name take the file's.

    Raises ConfigError when the file is missing, fails, or has no ``get_tables()`` that returns `Tables`.
    """
    tables = made_by(path, "get_tables", Tables)
    base = dataclasses.replace(tables.base, name=tables.base.name or f"tables_{path.stem}")
    agent = tables.agent
    if agent is not None:
        agent = dataclasses.replace(agent, name=agent.name or f"{base.name}_{AGENT}")
    return dataclasses.replace(tables, base=base, agent=agent)


def changed(config: Any, change: Change, run: str) -> Any:
    """A config, or a part of one, with the values of a change."""
    known, values = {field.name for field in dataclasses.fields(config)}, {}
    for field, value in change.items():
        if field not in known:
            problem = f"run {run} changes {field!r}, which is not a field of {type(config).__name__}"
            raise ConfigError(problem, field=f"runs.{run}.{field}")
        nested = isinstance(value, Mapping)
        values[field] = changed(getattr(config, field), value, run) if nested else value
    return dataclasses.replace(config, **values)


def config_of(tables: Tables, run: str, seed: int) -> Config:
    """The config of one run with one seed, in its own directory; a seed's methods are scored with the same shots.

    Raises ConfigError naming the run, when the change or the result cannot work.
    """
    base = tables.agent if run == AGENT else tables.base
    assert base is not None
    place = dataclasses.replace(base, workdir=tables.directory).inside(f"{run}/seed-{seed}")
    shots = base.eval.shots if run == AGENT else max(tables.shots)
    seeded: Change = {
        "compare": (),
        "workdir": place.workdir,
        "bucket": place.bucket,
        "train": {"seed": seed},
        "eval": {"seed": seed, "shots": shots, "latency": False},
    }
    try:
        return check(changed(changed(base, tables.runs.get(run, {}), run), seeded, run))
    except ConfigError as error:
        raise error.within(f"run {run}") from error


def reads_prompt(prompt: int, queries: int, positions: int) -> Change:
    """What `data` has to be for a method whose edge model reads the prompt before the queries, as it was published.

    Where a row cannot hold both, queries give way, and then shots.

    Args:
        prompt, queries: tokens that a row has room for.
        positions: of the edge model, which a row must keep to.
    """
    return {"edge_reads_prompt": True, "edge_length": min(prompt + queries, positions)}


def variants() -> dict[str, Change]:
    """The ablations of LoRA-Gen; a value that is the default's has no run of its own.

    The paper's own ablation of the routing is gumbel_top_k. gumbel also changes how many experts are used.
    """
    changes = {
        "experts_4": {"num_experts": 4},
        "experts_12": {"num_experts": 12},
        "cv_0": {"cv_coefficient": 0.0},
        "cv_0.005": {"cv_coefficient": 0.005},
        "cv_0.1": {"cv_coefficient": 0.1},
        "gumbel_top_k": {"routing": "gumbel_top_k"},
        "gumbel": {"routing": "gumbel"},
        "direct": {"generator": "direct"},
    }
    return {run: {"generator": change} for run, change in changes.items()}


def paper_tables(path: Path, edge_positions: int, compressor: bool = False) -> Tables:
    """The tables of one pair of models at the paper's scale, with each method's published hyper-parameters.

    Args:
        path: of the config file that trains LoRA-Gen on the pair (the paper's Table 10); its lengths of prompt and
            queries are those of all runs.
        edge_positions: of the edge model.
        compressor: with AutoCompressors, which the paper compares on OPT only.
    """
    # The tables' own file gives the name, and so the work directory.
    base = dataclasses.replace(read_config(path), name="", compare=())
    reading = reads_prompt(base.data.cloud_length, base.data.edge_length, edge_positions)
    rows = [one for key, one in registry.METHODS.items() if one.published is not None and key != GENERATOR]
    runs: dict[str, Change] = {}
    for method in rows:
        if not compresses(method):
            runs[method.key] = published(method, reading)
        if method is registry.BASELINE:
            runs[f"{method.key}_alone"] = published(method, {})
    runs |= {GENERATOR: {}, **variants()}
    if compressor:
        runs |= {method.key: published(method, reading) for method in rows if compresses(method)}
    return Tables(base, runs)


def compresses(method: Method) -> bool:
    """Whether the edge model gets a whole prompt in fewer tokens: one of those that Table 4 compares."""
    return method.traits.compresses_context and not method.needs_shots


def published(method: Method, reading: Change) -> Change:
    """The run of a method with its published settings; `reading` is for those whose edge model reads the prompt."""
    own = method.published or {}
    data = {**(reading if method.may_read_prompt else {}), **own.get("data", {})}
    return {"method": method.key, **own, **({"data": data} if data else {})}
