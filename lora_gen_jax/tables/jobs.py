"""What there is to do: one job for each run and seed, and which of them are finished.

In: `Tables` and a work directory. Out: jobs in the order in which they start, the longest first.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import difference, from_json, to_json
from lora_gen_jax.errors import CheckpointError, ConfigError
from lora_gen_jax.files import write_json
from lora_gen_jax.tables.spec import AGENT, MANY_SHOTS, UNTRAINED, UNTRAINED_METHODS, Tables, config_of

RESULT, LOG = "result.json", "log.txt"
# Rough times of a training step, LoRA's taken as one: only the order and the first estimate depend on them.
STEP = {"lora": 1.0, "lora_gen": 2.0, "lora_moe": 2.0, "mixlora": 3.0, "lorahub": 1.5, "autocompressor": 3.0}
# What scoring takes, in the same unit: an agent writes long outputs.
SCORING, AGENT_SCORING = 60.0, 300.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One run with one seed.

    Attributes:
        run: its name; `UNTRAINED` and `AGENT` are special.
        seed: of everything.
        config: complete, with a directory of its own.
        shots: numbers of shots that it is scored with, upwards.
    """

    run: str
    seed: int
    config: Config
    shots: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.run}/{self.seed}"

    @property
    def result(self) -> Path:
        """Written when everything is done."""
        return self.config.directory / RESULT

    @property
    def log(self) -> Path:
        return self.config.directory / LOG

    def methods(self, shots: int) -> tuple[str, ...]:
        """The methods of `evaluation.systems` that are scored with this many shots."""
        if self.run == UNTRAINED:
            return UNTRAINED_METHODS if shots == max(self.shots) else UNTRAINED_METHODS[1:]
        return (self.config.method,)

    @property
    def work(self) -> float:
        """How long it takes, in an arbitrary unit."""
        steps = self.config.train.steps
        if self.run == AGENT:
            return steps * (2 * STEP["lora"] + STEP["lora_gen"]) + AGENT_SCORING
        scoring = SCORING * len(self.shots)
        return scoring if self.run == UNTRAINED else steps * STEP.get(self.config.method, 2.0) + scoring


def make_jobs(tables: Tables) -> list[Job]:
    """All jobs of the tables, checked.

    Raises:
        ConfigError: as `config_of`, and for numbers of seeds or shots that cannot work.
    """
    if not tables.seeds or not tables.shots or min(tables.shots) < 0:
        raise ConfigError(f"seeds are {tables.seeds} and shots {tables.shots}: give one of each or more, shots >= 0")
    jobs = []
    for run in tables.names:
        many = run == UNTRAINED or run in MANY_SHOTS
        shots = tuple(sorted(set(tables.shots))) if many else (max(tables.shots),)
        jobs += [Job(run, seed, config_of(tables, run, seed), shots) for seed in dict.fromkeys(tables.seeds)]
    return jobs


def chosen(tables: Tables, jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs of these runs; all where none is named.

    Raises:
        ConfigError: for an unknown run.
    """
    for name in only:
        if name not in tables.names:
            near = difflib.get_close_matches(name, tables.names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--only has {name!r}{hint} The runs are {', '.join(tables.names)}")
    return [job for job in jobs if not only or job.run in only]


def missing(jobs: Sequence[Job]) -> list[Job]:
    """The jobs without a complete result, the longest first; a finished or begun run must have the asked settings.

    Raises:
        CheckpointError: naming the fields that differ.
    """
    left = []
    for job in jobs:
        found = finished(job)
        if found is None:
            check_begun(job)
        if found is None or (job.run != AGENT and not {str(n) for n in job.shots} <= set(found["shots"])):
            left.append(job)
    return sorted(left, key=lambda job: -job.work)


def finished(job: Job) -> dict[str, Any] | None:
    """What result.json holds; None where there is none, or a kill left half of one.

    Raises:
        CheckpointError: when it was made with other settings.
    """
    try:
        result = json.loads(job.result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    compare_settings(job, result["settings"], settings_of(job))
    return result


def check_begun(job: Job) -> None:
    """Raises CheckpointError where the directory holds a training run with other settings."""
    if job.run in (UNTRAINED, AGENT):
        return
    try:
        saved = json.loads((job.config.directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    compare_settings(job, saved | {"eval": to_json(job.config)["eval"]}, to_json(job.config))


def settings_of(job: Job) -> dict[str, Any]:
    """The settings that a job's result depends on: of scoring alone, training's do not count."""
    settings = to_json(job.config)
    return {name: settings[name] for name in ("edge", "eval")} if job.run == UNTRAINED else settings


def compare_settings(job: Job, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises CheckpointError where settings differ. Fields that were added since count as their defaults."""
    old, new = (to_json(from_json(one)) for one in (old, new))
    ignored = ("shots", "methods", "batch_tokens")
    evals = [{k: v for k, v in one["eval"].items() if k not in ignored} for one in (old, new)]
    lines = difference(old, new) + [f"eval.{line}" for line in difference(*evals)]
    if lines:
        raise CheckpointError(
            f"{job.config.directory} holds a run with another config; choose another --workdir, or undo:\n  "
            + "\n  ".join(lines)
        )


def write_result(job: Job, values: dict[str, Any]) -> None:
    """Writes result.json, complete or not at all, with the settings it was made with."""
    job.config.directory.mkdir(parents=True, exist_ok=True)
    write_json(job.result, {"run": job.run, "seed": job.seed, "settings": settings_of(job), **values})
