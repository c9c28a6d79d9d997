"""One job: trains, scores, and writes result.json.

In: a `Job`. Out: its directory with the training run, and result.json: by number of shots and method the scores of
every task, pooled ones of the seen and the unseen tasks, and how many parameters were trained. Latencies are left
out: other jobs run beside this one.
"""

import dataclasses
import json
import time
from typing import Any

import jax

from lora_gen_jax.config import Config
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.evaluation.run import evaluated_tasks, machine, score_systems, unfinished
from lora_gen_jax.evaluation.subject import digest_of
from lora_gen_jax.evaluation.systems import load_checkpoints, make_systems
from lora_gen_jax.lab.agent.command import AgentFlags, scored_tasks, with_training_rows
from lora_gen_jax.lab.agent.run import score_agents
from lora_gen_jax.lab.comparison import report_of
from lora_gen_jax.lab.tables.jobs import Job, inputs_of, write_result
from lora_gen_jax.lab.tables.spec import AGENT, UNTRAINED
from lora_gen_jax.models import load_pair
from lora_gen_jax.sharding import evaluation_mesh
from lora_gen_jax.training.checkpoint import versions
from lora_gen_jax.training.loop import train
from lora_gen_jax.training.prepare import with_steps


def do(job: Job) -> dict[str, Any]:
    """Does what is left of a job and returns what result.json holds beside its settings.

    Raises:
        LoraGenError, Stopped: as training and scoring.
    """
    began, inputs = time.monotonic(), inputs_of(job)
    values = {"inputs": inputs, **(agents(job) if job.run == AGENT else trained_and_scored(job))}
    values |= {"machine": machine(), "versions": versions(), "seconds": round(time.monotonic() - began, 1)}
    write_result(job, values)
    return values


def trained_and_scored(job: Job) -> dict[str, Any]:
    """{"shots": {number: {method: scores}}, "seen": {task: whether}, "steps", "trained_parameters"}."""
    config, values = job.config, {"steps": 0, "trained_parameters": 0}
    tasks = evaluated_tasks(config)
    if job.run != UNTRAINED:
        state = train(config)
        values = {"steps": int(state.step), "trained_parameters": sum(x.size for x in jax.tree.leaves(state.params))}
        del state
    pair = load_pair(config, evaluation_mesh(config.mesh.fsdp))
    found, by_shots = {}, {}
    with unfinished(config.directory, digest_of(json.dumps(list(job.shots)))) as journal:
        for number in job.shots:
            asked, methods = with_shots(config, number), job.methods(number)
            found = found or ({} if job.run == UNTRAINED else load_checkpoints(asked, methods, None))
            systems = make_systems(asked, methods, pair, found, tasks)
            results = score_systems(asked, pair, systems, tasks, journal)
            by_shots[str(number)] = shown(results, tasks)
    return {"shots": by_shots, "seen": {task.name: task.seen for task in tasks}, **values}


def with_shots(config: Config, number: int) -> Config:
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, shots=number))


def shown(results: dict[str, Any], tasks: list[Task]) -> dict[str, Any]:
    """By method: the tasks' scores, their means, and pooled ones under "groups"."""
    report, methods = report_of(results, tasks), {}
    for method, scores in results["methods"].items():
        methods[method] = {**scores, "groups": {title: group[method] for title, group in report.items()}}
    return methods


def agents(job: Job) -> dict[str, Any]:
    """{"agent": {method: {"seen" | "unseen": metrics}}, "steps"}; every output stands in agent.json beside it."""
    flags = AgentFlags(rows_per_toolset=job.agent_rows, methods=job.agent_methods, limit=job.config.eval.limit)
    tasks = scored_tasks(job.config, flags, False)
    config = with_training_rows(job.config, flags)
    report = score_agents(config, tasks, flags.methods, None, None)
    return {"agent": report["methods"], "steps": with_steps(config).train.steps}
