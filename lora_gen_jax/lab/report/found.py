"""What a report is made of. In: directories. Out: `Found`, the files of runs and evaluations that are there.

A directory may be a run's work directory, an output of eval.py or of another command. Directories directly inside it
are looked through, too: a run that was compared keeps its other methods there, and eval.py its results.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_gen_jax.errors import DataError

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
