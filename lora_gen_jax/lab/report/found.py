"""What a report is made of. In: directories. Out: `Found`, the files of runs and evaluations that are there; `Scores`.

A directory may be a run's work directory, an output of eval.py or of another command. Directories directly inside it
are looked through, too: a run that was compared keeps its other methods there, and eval.py its results.

Files that score the same tasks with the same edge model complete one another: methods and numbers of shots of one and
of the other stand in one table and one figure.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_gen_jax.errors import DataError
from lora_gen_jax.methods.registry import METHODS

# Each file with what it is good for and what writes it.
SOURCES = {
    "results.json": ("accuracy against latency", "python eval.py CONFIG.py, or train.py with compare"),
    "report.json": ("the comparison of a run", "python train.py CONFIG.py with compare, as configs/quickstart.py"),
    "gates.json": ("gates and expert usage", "python eval.py CONFIG.py --methods lora_gen, or train.py with compare"),
    "metrics.jsonl": ("training curves", "python train.py CONFIG.py"),
    "efficiency.json": ("the break-even curve", "lora-gen efficiency"),
    "agent.json": ("scores of tool calls", "lora-gen agent"),
}
METRICS = "metrics.jsonl"
Curve = list[tuple[int, float]]
"""(step, value) by rising step."""


@dataclass(frozen=True)
class File:
    """A JSON file that was found.

    Attributes:
        label: its directory, as short as it stays unambiguous.
        path: of the file.
        values: what it holds.
    """

    label: str
    path: Path
    values: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The metrics of a run.

    Attributes:
        label, path: as of `File`.
        curves: by name of the metric.
    """

    label: str
    path: Path
    curves: dict[str, Curve]


@dataclass
class Found:
    """Everything that was found, in the order of the directories.

    Attributes:
        files: by file name, without metrics.jsonl.
        runs: one a metrics.jsonl.
    """

    files: dict[str, list[File]] = field(default_factory=lambda: {name: [] for name in SOURCES if name != METRICS})
    runs: list[Run] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """Names of `SOURCES` of which there is no file."""
        return [name for name in SOURCES if not (self.runs if name == METRICS else self.files[name])]


def find(directories: Sequence[Path]) -> Found:
    """Reads what the directories hold."""
    if not directories:
        problem = "name at least one directory: a run's work directory, or what eval.py wrote"
        raise DataError(problem, field="directories", code="none")
    for directory in directories:
        if not directory.is_dir():
            remedy = "name a run's work directory, or what eval.py wrote"
            raise DataError(f"{directory} is not a directory", field="directories", code="no directory", remedy=remedy)
    places = {place.resolve(): place for directory in directories for place in (directory, *_inside(directory))}
    paths = [place / name for place in places.values() for name in SOURCES if (place / name).is_file()]
    if not paths:
        names = ", ".join(map(str, directories))
        problem = f"{names}: holds none of {', '.join(SOURCES)}"
        raise DataError(problem, field="directories", code="empty", remedy="name a work directory or an eval output")
    labels = _labels([path.parent for path in paths], {directory.resolve() for directory in directories})
    found = Found()
    for path in paths:
        if path.suffix == ".json":
            found.files[path.name].append(File(labels[path.parent], path, read_object(path)))
        elif curves := read_curves(path):
            found.runs.append(Run(labels[path.parent], path, curves))
    return found


def _inside(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))


def _labels(directories: list[Path], named: set[Path]) -> dict[Path, str]:
    """The last parts of each path, as many as tell it from the others; with its parent where only that was named."""
    unique = list(dict.fromkeys(directories))
    labels = {}
    for directory in unique:
        parts = directory.absolute().parts
        for count in range(1 if directory.resolve() in named else 2, len(parts) + 1):
            label = "/".join(parts[-count:])
            if sum(("/" + str(other.absolute())).endswith("/" + label) for other in unique) == 1:
                break
        labels[directory] = label.lstrip("/")
    return labels


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    again = f"write it again with {SOURCES[path.name][1]}, or remove it"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{path} cannot be read as JSON ({error})"
        raise DataError(problem, field=path.name, code="json", remedy=again) from error
    if not isinstance(values, dict):
        raise DataError(f"{path} does not hold a JSON object", field=path.name, code="type", remedy=again)
    return values


def read_curves(path: Path) -> dict[str, Curve]:
    """The curves of a metrics.jsonl; values that are no finite number and lines cut short by a kill are left out."""
    curves: dict[str, dict[int, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", field=path.name, code="unreadable") from error
    for line in lines:
        try:
            metrics = json.loads(line)
            step = int(metrics["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, {})[step] = float(value)
    return {name: sorted(values.items()) for name, values in curves.items()}


@dataclass(frozen=True)
class Point:
    """A method with one number of shots, on one task or on the mean of several.

    Attributes:
        shots: in the prompt; 0 for methods without one.
        accuracy: in [0, 1].
        stderr: its error; of a mean over tasks, sqrt(sum of squared errors) / tasks. None where it is not known, or
            not that of each task.
        latency_ms: of one answer; None where it was not measured.
        context: tokens that the edge model reads; None as well.
    """

    shots: int
    accuracy: float
    stderr: float | None
    latency_ms: float | None
    context: float | None


@dataclass(frozen=True)
class Scores:
    """Methods that can be compared.

    Attributes:
        files: where the figures come from.
        tasks: names, in the order of the first file.
        methods: method → shots → result, as results.json has them.
        checkpoints: method → the checkpoint that was scored.
    """

    files: list[File]
    tasks: list[str]
    methods: dict[str, dict[int, dict[str, Any]]]
    checkpoints: dict[str, Any]

    @property
    def machines(self) -> str:
        """What the latencies were measured on."""
        return "; ".join(dict.fromkeys(machine_text(file.values) for file in self.files))


def prompted(method: str, result: Mapping[str, Any]) -> bool:
    """Whether the prompt, and so the number of shots, makes a difference to a method's result.

    Files of earlier versions do not say; their edge models read it only where that is the method.
    """
    own = METHODS.get(method)
    return bool(result.get("prompted", own is None or own.edge_reads_prompt or own.depends_on_prompt))


def gather(files: Sequence[File]) -> list[Scores]:
    """One `Scores` for files that go together."""
    made: dict[Any, Scores] = {}
    for file in files:
        try:
            by_shots = shots_of(file.values)
            names = list(next(iter(next(iter(by_shots.values())).values()))["tasks"])
            config = file.values.get("config") or {}
            settings = config.get("eval") or {}
            edge = config.get("edge") or {}
            scored = (settings.get(name) for name in ("limit", "seed"))
            kept = (edge.get("source"), edge.get("dtype"), settings.get("split", "test"), *scored)
            key = (tuple(sorted(names)), *kept)
            _add(made, key, file, names, by_shots)
        except (StopIteration, KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"{file.path} has not the layout of results.json ({error!r})"
            remedy = "write it again with eval.py, or remove it"
            raise DataError(problem, field=file.path.name, code="layout", remedy=remedy) from error
    return list(made.values())


def _add(made: dict[Any, Scores], key: Any, file: File, names: list[str], by_shots: dict[int, Any]) -> None:
    """Puts a file's results with those of the same key, unless some of them are there already."""
    new: dict[str, dict[int, Any]] = {}
    for shots, methods in sorted(by_shots.items()):
        for method, result in methods.items():
            new.setdefault(method, {}).setdefault(shots if prompted(method, result) else 0, result)
            for name in names:
                float(result["tasks"][name]["acc"])
    checkpoints = file.values.get("checkpoints") or {}
    while key in made:
        known, same = made[key].methods, made[key].checkpoints
        # Methods without a prompt are the same in both; the first file's stay. Two generators are never one line.
        twice = any(s in known.get(m, {}) for m, of in new.items() for s, result in of.items() if prompted(m, result))
        if not twice and all(same.get(m, checkpoint) == checkpoint for m, checkpoint in checkpoints.items()):
            break
        key = (*key, "again")
    scores = made.setdefault(key, Scores([], names, {}, {}))
    scores.checkpoints.update(checkpoints)
    scores.files.append(file)
    for method, of in new.items():
        for shots, result in of.items():
            scores.methods.setdefault(method, {}).setdefault(shots, result)


def shots_of(results: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Number of shots → methods."""
    if results.get("by_shots"):
        return {int(shots): methods for shots, methods in results["by_shots"].items()}
    shots = ((results.get("config") or {}).get("eval") or {}).get("shots", 0)
    return {int(shots[0] if isinstance(shots, list) else shots): results["methods"]}


def mean_point(result: dict[str, Any], tasks: Sequence[str], shots: int) -> Point:
    """AVE over tasks as a point."""
    points = [task_point(result, name, shots) for name in tasks]
    n, errors = len(points), [point.stderr for point in points if point.stderr is not None]
    return Point(
        shots,
        sum(point.accuracy for point in points) / n,
        math.hypot(*errors) / n if len(errors) == n else None,
        _mean([point.latency_ms for point in points]),
        _mean([point.context for point in points]),
    )


def task_point(result: dict[str, Any], task: str, shots: int) -> Point:
    """One task as a point."""
    row = result["tasks"][task]
    return Point(shots, row["acc"], row.get("stderr"), row.get("latency_ms"), row.get("context_tokens"))


def _mean(values: Sequence[float | None]) -> float | None:
    """Of what was measured: tasks of lm-eval have no latency."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def machine_text(results: dict[str, Any]) -> str:
    """Machine and versions of a results.json in one line."""
    machine, versions = (
        found if isinstance(found := results.get(key), dict) else {} for key in ("machine", "versions")
    )
    cores = f"{machine.get('cpus')} CPU cores" if machine.get("platform") == "cpu" else machine.get("device")
    parts = [machine.get("system"), cores, f"jax {versions['jax']}" if "jax" in versions else None]
    return ", ".join(str(part) for part in parts if part) or "a machine that the file does not name"
