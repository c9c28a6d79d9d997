"""Means over tasks: accuracy, its harmonic mean, and the score of each source with a bootstrap interval.

In: results by task. Out: what results.json holds beside them for a method. A task's score is its accuracy, or ROUGE-L
where reference answers are long (`lora_gen_jax.evaluation.answers`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 10_000


def standard_error(values: Sequence[float]) -> float:
    """Standard deviation (n - 1 degrees of freedom) over √n, as lm-evaluation-harness has it; 0 for a single value."""
    n = len(values)
    return float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else 0.0


def summary(tasks: dict[str, dict], seen: Mapping[str, bool | None]) -> dict[str, float | None]:
    """AVE (mean of `acc`) and HAR (their harmonic mean) over all tasks, over the seen and over the unseen ones.

    Under "ave", "har", "ave_seen", "har_seen", "ave_unseen" and "har_unseen"; None where there are no such tasks.
    """
    found: dict[str, float | None] = {}
    for end, kinds in (("", (True, False, None)), ("_seen", (True,)), ("_unseen", (False,))):
        acc = [result["acc"] for name, result in tasks.items() if seen[name] in kinds]
        found[f"ave{end}"] = float(np.mean(acc)) if acc else None
        found[f"har{end}"] = statistics.harmonic_mean(acc) if acc else None
    return found


def error_of(scores: Mapping, seen: Mapping[str, bool | None], name: str) -> float | None:
    """Standard error over documents of one of the means of `summary`.

    Of a mean over n tasks with errors s it is sqrt(Σ s²) / n; of the harmonic mean h of accuracies a, to first order,
    h² / n · sqrt(Σ (s / a²)²). None where a task's error is not known, or an accuracy of the harmonic mean is 0.

    Args:
        scores: of a method: the means, and results by task under "tasks".
        seen: whether generators are trained on a task.
        name: of the mean.
    """
    which, _, kind = name.partition("_")
    tasks = [one for task, one in scores["tasks"].items() if not kind or seen[task] is (kind == "seen")]
    accuracies, errors = [one["acc"] for one in tasks], [one.get("stderr") for one in tasks]
    if not tasks or None in errors:
        return None
    if which != "har":
        return math.hypot(*errors) / len(tasks)
    if not all(accuracies):
        return None
    return scores[name] ** 2 / len(tasks) * math.hypot(*(s / a**2 for s, a in zip(errors, accuracies, strict=True)))


def scores(tasks: Mapping[str, Mapping], sources: Mapping[str, str]) -> dict[str, dict]:
    """{"mean": of all tasks, "groups": {source: of its tasks}}, each {"score", "interval", "tasks"}."""
    groups: dict[str, list[float]] = {}
    for name, result in tasks.items():
        groups.setdefault(sources[name], []).append(result.get("rouge_l", result["acc"]))
    return {
        "mean": with_interval([score for group in groups.values() for score in group]),
        "groups": {source: with_interval(group) for source, group in groups.items()},
    }


def with_interval(values: Sequence[float]) -> dict:
    """The mean over tasks and the 95 % interval of means of as many tasks, drawn with replacement.

    It says how much depends on which tasks there are, not on which documents a task has. The draws are the same every
    time. A single task has no interval.
    """
    interval = None
    if len(values) > 1:
        drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
        interval = [float(x) for x in np.percentile(np.asarray(values)[drawn].mean(axis=1), (2.5, 97.5))]
    return {"score": float(np.mean(values)), "interval": interval, "tasks": len(values)}
