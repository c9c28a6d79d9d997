"""What finished jobs left, as one plain dictionary that the tables are made from.

In: jobs. Out: {"settings": {run: config}, "runs": {method row: {seed: {shots: scores}}}, "seen": {task: whether},
"facts": {run: {seed: {"steps", "trained_parameters", "seconds"}}}, "agent": {seed: {method: {group: metrics}}},
"machines": [{"machine", "runs"}], "versions": [{"versions", "runs"}], "seeds", "shots"}. Seeds and numbers of shots are
texts, as in JSON.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_gen_jax.config_file import to_json
from lora_gen_jax.evaluation.means import summary
from lora_gen_jax.lab.tables.jobs import Job, finished
from lora_gen_jax.lab.tables.spec import AGENT, UNTRAINED

FACTS = ("steps", "trained_parameters", "seconds")


def gather(jobs: Sequence[Job]) -> dict[str, Any]:
    """The results of the jobs that are finished.

    Raises:
        CheckpointError: as `finished`.
    """
    found: dict[str, Any] = {"settings": {}, "runs": {}, "seen": {}, "facts": {}, "agent": {}}
    found |= {"machines": [], "versions": [], "shots": str(max((max(job.shots) for job in jobs), default=0))}
    found["seeds"] = list(dict.fromkeys(str(job.seed) for job in jobs))
    for job in jobs:
        found["settings"].setdefault(job.run, to_json(job.config))
        if (result := finished(job)) is not None:
            add(found, job, result)
    return found


def add(found: dict[str, Any], job: Job, result: dict[str, Any]) -> None:
    """Adds what one result.json holds."""
    seed = str(job.seed)
    found["facts"].setdefault(job.run, {})[seed] = {name: result[name] for name in FACTS if name in result}
    note(found["machines"], "machine", result["machine"], job.run)
    note(found["versions"], "versions", result["versions"], job.run)
    if job.run == AGENT:
        found["agent"][seed] = {name: one for name, one in result["agent"].items() if name in job.agent_methods}
        return
    found["seen"] |= result["seen"]
    for number, methods in result["shots"].items():
        for method, scores in methods.items():
            row = method if job.run == UNTRAINED else job.run
            means = summary(scores["tasks"], result["seen"])  # an older result lacks some
            found["runs"].setdefault(row, {}).setdefault(seed, {})[number] = means | scores


def note(places: list[dict[str, Any]], name: str, value: Any, run: str) -> None:
    """Adds a run to those that were made in one way, of which there may be several."""
    same = [place for place in places if place[name] == value]
    if not same:
        places.append({name: value, "runs": [run]})
    elif run not in same[0]["runs"]:
        same[0]["runs"].append(run)


def error_of(found: Mapping[str, Any], scores: Mapping[str, Any], name: str) -> float | None:
    """Standard error over documents of one seed's "ave" or "har", or of these with "_seen" or "_unseen" behind.

    Of a mean over n tasks with errors s it is sqrt(Σ s²) / n; of the harmonic mean h of accuracies a, to first order,
    h² / n · sqrt(Σ (s / a²)²). None where a task's error is not known, or an accuracy of the harmonic mean is 0.

    Args:
        found: as `gather` gives it.
        scores: of a row, by task under "tasks".
        name: of the mean.
    """
    which, _, kind = name.partition("_")
    kinds = {"seen": True, "unseen": False}
    tasks = [one for task, one in scores["tasks"].items() if not kind or found["seen"][task] is kinds[kind]]
    errors = [one.get("stderr") for one in tasks]
    if not tasks or None in errors:
        return None
    if which != "har":
        return math.hypot(*errors) / len(tasks)
    accuracies = [one["acc"] for one in tasks]
    if not all(accuracies):
        return None
    return scores[name] ** 2 / len(tasks) * math.hypot(*(s / a**2 for s, a in zip(errors, accuracies, strict=True)))
