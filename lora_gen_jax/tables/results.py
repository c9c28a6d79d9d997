"""What finished jobs left, as one plain dictionary that the tables are made from.

In: jobs. Out: {"settings": {run: config}, "runs": {method row: {seed: {shots: scores}}}, "seen": {task: whether},
"facts": {run: {seed: {"steps", "trained_parameters", "seconds"}}}, "agent": {seed: {method: {group: metrics}}},
"machine", "versions", "seeds", "shots"}. Seeds and numbers of shots are texts, as in JSON.
"""

from collections.abc import Sequence
from typing import Any

from lora_gen_jax.config_file import to_json
from lora_gen_jax.tables.jobs import Job, finished
from lora_gen_jax.tables.spec import AGENT, UNTRAINED

FACTS = ("steps", "trained_parameters", "seconds")


def gather(jobs: Sequence[Job]) -> dict[str, Any]:
    """The results of the jobs that are finished.

    Raises:
        CheckpointError: as `finished`.
    """
    found: dict[str, Any] = {"settings": {}, "runs": {}, "seen": {}, "facts": {}, "agent": {}}
    found |= {"machine": {}, "versions": {}, "shots": str(max((max(job.shots) for job in jobs), default=0))}
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
    found["machine"], found["versions"] = result["machine"], result["versions"]
    if job.run == AGENT:
        found["agent"][seed] = result["agent"]
        return
    found["seen"] |= result["seen"]
    for number, methods in result["shots"].items():
        for method, scores in methods.items():
            row = method if job.run == UNTRAINED else job.run
            found["runs"].setdefault(row, {}).setdefault(seed, {})[number] = scores
