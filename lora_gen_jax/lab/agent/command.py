"""``lora-gen agent CONFIG.py``: the agent scenario, and real function calls with ``--bfcl``.

In: a config file, flags of this command, and flags that override fields of the config. Out: agent.json or bfcl.json.
"""

import dataclasses
from pathlib import Path

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import flags_and_config
from lora_gen_jax.data.gpt4tools import generated_records, load_gpt4tools, training_records
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.tasks import Task, stable_hash
from lora_gen_jax.errors import ConfigError, OutputError
from lora_gen_jax.lab.agent.function_calls import score_function_calls
from lora_gen_jax.lab.agent.run import score_agents
from lora_gen_jax.lab.agent.table import AGENT_ROWS
from lora_gen_jax.methods.registry import GENERATOR

PROGRAM = "lora-gen agent"


@dataclasses.dataclass(frozen=True)
class AgentFlags:
    """Flags of agent beside those of the config."""

    rows: tuple[Path, ...] = ()
    """Files of GPT4Tools test rows with tools that training does not see; left out, the embedded tool sets."""
    seen_rows: tuple[Path, ...] = ()
    """Files of GPT4Tools test rows whose tools training sees; without a file, those of --rows are seen."""
    train_rows: tuple[Path, ...] = ()
    """Files of GPT4Tools training rows; left out, rows of the embedded seen tool sets are generated."""
    rows_per_toolset: int = 96
    """Training rows that are generated for each embedded tool set."""
    methods: tuple[str, ...] = tuple(AGENT_ROWS)
    """Rows of the table."""
    untrained_checkpoint: Path | None = None
    """A generator that never saw tools; left out, the one that is shipped for the pocket pair."""
    bfcl: tuple[Path, ...] = ()
    """Score function calls instead: Berkeley's files bfcl_*.jsonl, or a directory of them. Nothing is trained."""
    checkpoint: Path | None = None
    """The generator that is scored; left out, the one that this command trains, or trained, in the work directory."""
    limit: int | None = None
    """Score the first N test rows of each tool set, or of each file; left out, eval.limit."""
    out: Path | None = None
    """Directory for the results; left out, the work directory."""


def agent_main(arguments: list[str]) -> None:
    """``agent CONFIG.py [--rows FILE …] [--seen-rows [FILE …]] [--train-rows FILE …] [--limit N] [--out DIR]``.

    Raises LoraGenError for flags or rows that cannot be used, before anything is trained; and as training.
    """
    flags, config = flags_and_config(PROGRAM, AgentFlags, arguments)
    bare = not flags.seen_rows and any(one.replace("_", "-") == "--seen-rows" for one in arguments)
    if flags.limit is not None and flags.limit < 1:
        raise ConfigError(f"--limit is {flags.limit}; at least 1", field="--limit")
    if flags.limit is None:
        flags = dataclasses.replace(flags, limit=config.eval.limit)
    if flags.bfcl:
        shared = ("bfcl", "checkpoint", "limit", "out")
        fields = [field for field in dataclasses.fields(flags) if field.name not in shared]
        if given := [field.name for field in fields if getattr(flags, field.name) != field.default]:
            problem = f"--{given[0].replace('_', '-')} is not used with --bfcl"
            raise ConfigError(problem, field=f"--{given[0].replace('_', '-')}", remedy="leave one of them out")
        score_function_calls(config, flags.bfcl, flags.checkpoint, flags.limit, flags.out)
        return
    tasks = scored_tasks(config, flags, bare)
    config = with_training_rows(config, flags)
    score_agents(config, tasks, flags.methods, flags.untrained_checkpoint, flags.out, flags.checkpoint)


def scored_tasks(config: Config, flags: AgentFlags, rows_are_seen: bool) -> list[Task]:
    """What is scored: the user's rows, else the tasks of eval.tasks."""
    if rows_are_seen and not flags.rows:
        problem = "--seen-rows without a file says that the tools of --rows are seen"
        raise ConfigError(problem, field="--seen-rows", remedy="give --rows FILE")
    if flags.rows or flags.seen_rows:
        tasks = load_gpt4tools(flags.rows, seen=rows_are_seen) if flags.rows else []
        tasks += load_gpt4tools(flags.seen_rows, seen=True) if flags.seen_rows else []
    else:
        tasks = list(load_tasks(config.eval.tasks).values())
    tasks = [dataclasses.replace(task, test=tuple(task.test[: flags.limit])) for task in tasks if task.test]
    for task in tasks:
        if not task.descriptions or not task.descriptions[0].strip():
            problem = f"eval.tasks has {task.name}, which has no tools"
            remedy = "name pocket_agent, pocket_agent_unseen"
            raise ConfigError(problem, field="eval.tasks", code="no tools", remedy=remedy)
    if not tasks:
        remedy = "name pocket_agent and pocket_agent_unseen, or give --rows"
        raise ConfigError("eval.tasks names no agent task", field="eval.tasks", code="none", remedy=remedy)
    return tasks


def with_training_rows(config: Config, flags: AgentFlags) -> Config:
    """The config that trains on the user's rows, else on generated ones; they are written to the work directory."""
    rows = [AGENT_ROWS[name] for name in flags.methods if name in AGENT_ROWS]
    if not any(row.trained and not (flags.checkpoint and row.method is GENERATOR) for row in rows):
        return config
    text = training_records(flags.train_rows) if flags.train_rows else generated_records(flags.rows_per_toolset)
    # Named by its content, so that a run that was trained on other rows is not taken for this one.
    path = config.directory / f"rows-{stable_hash(text):016x}.jsonl"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror}"
        raise OutputError(problem, field="--workdir", code="unwritable", remedy="choose another --workdir") from error
    data = dataclasses.replace(config.data, tasks=(), source_weights=(), files=(path,))
    return dataclasses.replace(config, data=data)
