"""``lora-gen table CONFIG.py``: trains what is missing, scores all methods alike, and prints the paper's tables.

In: a file with ``get_tables()``, flags of this command, and flags that override fields of the base config, or with
``--agent.`` before the field, of the agent's. Out: tables.json and tables.md. What is finished is kept: the same
command goes on.
"""

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from tyro.conf import AvoidSubcommands, FlagConversionOff, arg

from lora_gen_jax.config import Config
from lora_gen_jax.config_check import check
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.systems import check_methods
from lora_gen_jax.files import check_output, listed
from lora_gen_jax.lab.tables.jobs import Job, chosen, make_jobs, missing, outdated
from lora_gen_jax.lab.tables.run import do, end_with_parent, run_jobs, say
from lora_gen_jax.lab.tables.spec import AGENT, Tables, read_tables

PROGRAM = "lora-gen table"
COMMAND = (sys.executable, "-m", "lora_gen_jax", "table")
# Behind the user's arguments in a process that is started for one job.
JOB = "--job"


@dataclasses.dataclass(frozen=True)
class TableFlags:
    """Flags of table beside those of the base config, and of the agent's after --agent."""

    seeds: str | None = None
    """Numbers separated by commas; left out, the file's."""
    only: str | None = None
    """Runs that are trained and scored, separated by commas; tables show all that is finished."""
    out: Path | None = None
    """Directory for tables.json and tables.md; left out, the work directory."""


def table_main(arguments: list[str]) -> None:
    """``table CONFIG.py [--seeds 0,1,2] [--only NAME,NAME] [--out DIR] [--any.config.field VALUE …]``.

    Raises:
        LoraGenError: for bad input, before anything is trained.
        SystemExit: with status 1 after everything else, where a job failed.
        Stopped: after a signal.
    """
    job = None
    if arguments[-2:-1] == [JOB]:
        *arguments, _, job = arguments
    flags, tables = parsed(arguments)
    jobs = make_jobs(tables)
    if job is not None:
        do_job(jobs, job)
        return
    if flags.out is not None:
        check_output(flags.out)
    for method in {method for job in jobs if job.run != AGENT for n in job.shots for method in job.methods(n)}:
        check_methods([method], "a run's method")
    # Of all jobs, chosen or not: after hours of training the tables would fail.
    old = outdated(jobs)
    left = missing(chosen(tables, jobs, listed(flags.only)))
    if others := [job.name for job in old if job not in left]:
        say(f"not in the tables until they are scored again, with other settings or data: {', '.join(others)}")
    from lora_gen_jax.lab.tables.output import write_tables

    if not left:
        say("everything is trained and scored")
    failed = run_jobs(left, lambda job: [*COMMAND, *arguments, JOB, job.name])
    complete = write_tables(tables, jobs, flags.out)
    if failed or not complete:
        names = [job.name for job in failed] or ["the measurement of costs"]
        say(f"failed: {', '.join(names)}; the same command tries again")
        sys.exit(1)


def parsed(arguments: Sequence[str]) -> tuple[TableFlags, Tables]:
    """This command's flags, and the file's tables with the values of all other flags."""
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            tyro.cli(TableFlags, prog=f"{PROGRAM} CONFIG.py", args=["--help"])
        problem = f"name a config file first: {PROGRAM} configs/tables/pocket.py [--any.field VALUE …]"
        raise ConfigError(problem, field="config", code="none")
    tables = read_tables(Path(arguments[0]))
    for flag in arguments[1:]:
        if flag.startswith(f"--{AGENT}.") and tables.agent is None:
            raise ConfigError(f"{arguments[0]} has no agent table", field=flag, remedy=f"leave {flag} out")
        if flag.startswith(("--distributed.", f"--{AGENT}.distributed.")):
            remedy = "leave the distributed flags to train.py and eval.py"
            raise ConfigError(f"{PROGRAM} runs in one process", field="distributed", remedy=remedy)

    class Arguments(NamedTuple):
        flags: Annotated[TableFlags, arg(name="")] = TableFlags()
        base: Annotated[Config, FlagConversionOff, AvoidSubcommands, arg(name="")] = tables.base
        agent: Annotated[Config, FlagConversionOff, AvoidSubcommands] = tables.agent or tables.base

    made = tyro.cli(Arguments, prog=f"{PROGRAM} {arguments[0]}", description=TableFlags.__doc__, args=arguments[1:])
    agent = None if tables.agent is None else check(made.agent)
    seeds = tables.seeds if made.flags.seeds is None else numbers(made.flags.seeds)
    return made.flags, dataclasses.replace(tables, base=check(made.base), agent=agent, seeds=seeds)


def numbers(text: str) -> tuple[int, ...]:
    """Numbers between commas."""
    parts = listed(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds is {text!r}", field="--seeds", remedy="give numbers separated by commas, as 0,1,2")
    return tuple(dict.fromkeys(map(int, parts)))


def do_job(jobs: Sequence[Job], name: str) -> None:
    """Does one job in this process."""
    found = [job for job in jobs if job.name == name]
    if not found:
        near = difflib.get_close_matches(name, [job.name for job in jobs], n=1)
        remedy = f"did you mean {near[0]}?" if near else None
        raise ConfigError(f"--job has {name!r}, which is not a RUN/SEED", field="--job", remedy=remedy)
    end_with_parent()
    do(found[0])
