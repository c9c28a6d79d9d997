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
from typing import Any

import tyro

from lora_gen_jax.config_file import overridden
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.systems import check_methods
from lora_gen_jax.files import check_output
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
    flags, rest = parsed(arguments)
    tables = tables_from_args(flags, rest)
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
    left = missing(chosen(tables, jobs, split(flags.only)))
    if others := [job.name for job in old if job not in left]:
        say(f"not in the tables until they are scored again, with other settings or data: {', '.join(others)}")
    from lora_gen_jax.lab.tables.output import write_tables

    failed = run_missing(left, arguments)
    complete = write_tables(tables, jobs, flags.out)
    if failed or not complete:
        names = [job.name for job in failed] or ["the measurement of costs"]
        say(f"failed: {', '.join(names)}; the same command tries again")
        sys.exit(1)


def parsed(arguments: Sequence[str]) -> tuple[TableFlags, list[str]]:
    """This command's flags, and what remains."""
    names = {f"--{field.name}" for field in dataclasses.fields(TableFlags)}
    own, rest = [], []
    iterator = iter(arguments)
    for argument in iterator:
        if argument.split("=", 1)[0] not in names:
            rest.append(argument)
            continue
        own.append(argument)
        if "=" not in argument and (value := next(iterator, None)) is not None:
            own.append(value)
    if any(argument in ("-h", "--help") for argument in rest):
        tyro.cli(TableFlags, prog=f"{PROGRAM} CONFIG.py", args=["--help"])
    return tyro.cli(TableFlags, prog=PROGRAM, args=own), rest


def tables_from_args(flags: TableFlags, rest: Sequence[str]) -> Tables:
    """The file's tables, with the flags' values."""
    if not rest or rest[0].startswith("-"):
        problem = f"name a config file first: {PROGRAM} configs/tables/pocket.py [--any.field VALUE …]"
        raise ConfigError(problem, field="config", code="none")
    tables = read_tables(Path(rest[0]))
    own, agent = divided(rest[1:])
    changes: dict[str, Any] = {"base": overridden(tables.base, f"{PROGRAM} {rest[0]}", own)}
    if agent and tables.agent is None:
        flag = agent[0].replace("--", f"--{AGENT}.", 1)
        raise ConfigError(f"{rest[0]} has no agent table", field=flag, remedy=f"leave {flag} out")
    if tables.agent is not None:
        changes[AGENT] = overridden(tables.agent, f"{PROGRAM} {rest[0]} --{AGENT}", agent)
    if flags.seeds is not None:
        changes["seeds"] = numbers(flags.seeds)
    return dataclasses.replace(tables, **changes)


def divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(flags of the base config, flags of the agent's without their prefix)."""
    own: list[str] = []
    agent: list[str] = []
    taken = own
    for argument in arguments:
        if argument.startswith("--"):
            taken = agent if argument.startswith(f"--{AGENT}.") else own
            argument = argument.replace(f"--{AGENT}.", "--", 1)
        taken.append(argument)
    return own, agent


def numbers(text: str) -> tuple[int, ...]:
    """Numbers between commas."""
    parts = split(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds is {text!r}", field="--seeds", remedy="give numbers separated by commas, as 0,1,2")
    return tuple(dict.fromkeys(map(int, parts)))


def split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def do_job(jobs: Sequence[Job], name: str) -> None:
    """Does one job in this process."""
    found = [job for job in jobs if job.name == name]
    if not found:
        near = difflib.get_close_matches(name, [job.name for job in jobs], n=1)
        remedy = f"did you mean {near[0]}?" if near else None
        raise ConfigError(f"--job has {name!r}, which is not a RUN/SEED", field="--job", remedy=remedy)
    end_with_parent()
    do(found[0])


def run_missing(left: Sequence[Job], arguments: Sequence[str]) -> list[Job]:
    """Runs the jobs, each in a process of its own; returns those that failed."""
    if not left:
        say("everything is trained and scored")
    return run_jobs(left, lambda job: [*COMMAND, *arguments, JOB, job.name])
