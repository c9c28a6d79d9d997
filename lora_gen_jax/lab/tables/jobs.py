"""What there is to do: one job for each run and seed, and which of them are finished.

In: `Tables` and a work directory. Out: jobs in the order in which they run, and what finished ones left.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import difference, from_json, to_json
from lora_gen_jax.data.reasoning import REASONING_TASKS, folder_of
from lora_gen_jax.errors import CheckpointError, ConfigError, DataError
from lora_gen_jax.files import write_json
from lora_gen_jax.lab.tables.spec import AGENT, GENERATOR, UNTRAINED, UNTRAINED_METHODS, Tables, config_of

RESULT, LOG = "result.json", "log.txt"


@dataclasses.dataclass(frozen=True)
class Job:
    """One run with one seed.

    Attributes:
        run: its name; `UNTRAINED` and `AGENT` are special.
        seed: of everything.
        config: complete, with a directory of its own.
        shots: numbers of shots that it is scored with, in ascending order.
        agent_rows: of the agent table: training rows for each embedded tool set.
        agent_methods: of the agent table: its rows.
    """

    run: str
    seed: int
    config: Config
    shots: tuple[int, ...]
    agent_rows: int = 0
    agent_methods: tuple[str, ...] = ()

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
        """What is scored with this many shots."""
        if self.run == UNTRAINED:
            return UNTRAINED_METHODS if shots == max(self.shots) else UNTRAINED_METHODS[1:]
        return (self.config.method,)

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on; where nothing is trained, the settings of training do not count."""
        settings = to_json(self.config)
        return {name: settings[name] for name in ("edge", "eval")} if self.run == UNTRAINED else settings

    def inputs(self) -> dict[str, Any]:
        """What the result depends on besides the config: the content of the user's files, or the rows that are made."""
        if self.run == AGENT:
            return {"agent_rows": self.agent_rows}
        data, scored = self.config.data, self.config.eval.tasks or REASONING_TASKS
        names = set(scored if self.run == UNTRAINED else (*data.tasks, *scored)) & set(REASONING_TASKS)
        found = {name: folder_of(data.dir, name) for name in sorted(names) if data.dir}
        return {
            "data.files": {str(path): content_digest(path) for path in data.files},
            "data.dir": {name: content_digest(folder, nested=True) for name, folder in found.items() if folder},
        }

    def is_complete(self, result: dict[str, Any]) -> bool:
        """Whether a result has every method with every number of shots, or every row of the agent table."""
        if self.run == AGENT:
            return set(self.agent_methods) <= set(result["agent"])
        return all(set(self.methods(n)) <= set(result["shots"].get(str(n), ())) for n in self.shots)


def make_jobs(tables: Tables) -> list[Job]:
    """All jobs of the tables, checked.

    Raises ConfigError as `config_of`, and for numbers of seeds or shots that cannot work.
    """
    if not tables.seeds or not tables.shots or min(tables.shots) < 0:
        problem = f"seeds are {tables.seeds} and shots {tables.shots}: give one of each or more, shots >= 0"
        raise ConfigError(problem, field="shots" if tables.seeds else "seeds")
    jobs = []
    for run in tables.names:
        shots = tuple(sorted(set(tables.shots))) if run in (UNTRAINED, GENERATOR) else (max(tables.shots),)
        agent = (tables.agent_rows, tables.agent_methods) if run == AGENT else (0, ())
        jobs += [Job(run, seed, config_of(tables, run, seed), shots, *agent) for seed in dict.fromkeys(tables.seeds)]
    return jobs


def chosen(tables: Tables, jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs of these runs; all where none is named."""
    for name in only:
        if name not in tables.names:
            near = difflib.get_close_matches(name, tables.names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(f"--only has {name!r}{hint} The runs are {', '.join(tables.names)}", field="--only")
    return [job for job in jobs if not only or job.run in only]


def missing(jobs: Sequence[Job]) -> list[Job]:
    """The jobs without a complete result.

    Raises CheckpointError where a run was finished, or begun, with other settings, which it names.
    """
    left = []
    for job in jobs:
        found = finished(job)
        begun = _read(job.config.directory / "config.json") if job.run not in (UNTRAINED, AGENT) else None
        if found is None and begun is not None:
            _refuse(job, difference(_as_now(begun), _as_now(to_json(job.config))))
        if found is None or not job.is_complete(found):
            left.append(job)
    return left


def outdated(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with a result that cannot be used: it is incomplete, or was scored in another way than is asked."""
    return [job for job in jobs if finished(job) is None and job.result.exists()]


def finished(job: Job) -> dict[str, Any] | None:
    """What result.json holds.

    None where there is none, where a kill left half of one, and where it has to be scored again: with other settings
    under eval, or, where nothing is trained, on other data.

    Raises CheckpointError when it was trained with other settings.
    """
    result = _read(job.result)
    if result is None or not isinstance(result.get("settings"), dict):
        return None
    old, new, now = _as_now(result["settings"]), _as_now(job.settings), job.inputs()
    before = result.get("inputs", {})
    # What an older version did not write counts as the same.
    others = [f"{name}: {before[name]!r} -> {now[name]!r}" for name in now if before.get(name, now[name]) != now[name]]
    _refuse(job, difference(old, new) + ([] if job.run == UNTRAINED else others))
    return result if _scoring(old) == _scoring(new) and not others else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _as_now(settings: dict[str, Any]) -> dict[str, Any]:
    """Saved settings with the fields that were added since, at their defaults."""
    return to_json(from_json(settings))


def _scoring(settings: dict[str, Any]) -> dict[str, Any]:
    """What a score depends on under eval; a result says itself which methods it scored with how many shots."""
    return {name: value for name, value in settings["eval"].items() if name not in ("shots", "methods")}


def _refuse(job: Job, lines: Sequence[str]) -> None:
    """Raises CheckpointError where there are lines about what differs."""
    if lines:
        raise CheckpointError(
            f"{job.config.directory} holds a run with another config",
            remedy="choose another --workdir, or undo:\n  " + "\n  ".join(lines),
            field="--workdir",
            code="another config",
        )


def write_result(job: Job, values: dict[str, Any]) -> None:
    """Writes result.json, complete or not at all, with what it was made with."""
    job.config.directory.mkdir(parents=True, exist_ok=True)
    made_with = {"run": job.run, "seed": job.seed, "settings": job.settings, "inputs": job.inputs()}
    write_json(job.result, made_with | values, "--workdir")


def content_digest(path: Path, nested: bool = False) -> str:
    """16 hex digits of what a JSONL file holds, or all of them in a directory; nested, all files below it."""
    try:
        inside = path.rglob("*") if nested else path.glob("*.json*")
        wanted = (p for p in inside if p.is_file() and (nested or p.suffix in (".jsonl", ".json")))
        files = sorted(wanted) if path.is_dir() else [path]
        known = [(file.name, _digest(file, file.stat().st_mtime_ns, file.stat().st_size)) for file in files]
    except OSError as error:
        field = "data.dir" if nested else "data.files"
        problem = f"{error.filename} cannot be read: {error.strerror} ({field})"
        raise DataError(problem, field=field, code="unreadable") from error
    return known[0][1] if known and not path.is_dir() else hashlib.sha256(repr(known).encode()).hexdigest()[:16]


@functools.lru_cache
def _digest(path: Path, changed: int, size: int) -> str:
    # Time and size tell that a file has changed since.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
