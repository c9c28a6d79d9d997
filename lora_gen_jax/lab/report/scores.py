"""Results of several files as one table. In: results.json files. Out: `Scores`: method → number of shots → result.

Files that score the same tasks with the same edge model complete one another: methods and numbers of shots of one and
of the other stand in one table and one figure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_gen_jax.errors import DataError
from lora_gen_jax.lab.report.found import File
from lora_gen_jax.methods.registry import METHODS


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
