"""Jobs, one after another, each in a process of its own that has the whole machine and gives its memory back.

In: jobs. Out: for each its training run and result.json: by number of shots and method the scores of every task, pooled
ones of the seen and the unseen tasks, and how many parameters were trained. Latencies are measured elsewhere. Ctrl-C
and SIGTERM reach the running job, which saves a checkpoint; a job also ends when the process that started it is gone.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_gen_jax.errors import Stopped
from lora_gen_jax.evaluation.run import evaluated_tasks, machine, score_systems, unfinished
from lora_gen_jax.evaluation.subject import digest_of
from lora_gen_jax.evaluation.systems import load_checkpoints, make_systems
from lora_gen_jax.lab.agent.command import AgentFlags, scored_tasks, with_training_rows
from lora_gen_jax.lab.agent.run import score_agents
from lora_gen_jax.lab.comparison import report_of
from lora_gen_jax.lab.tables.jobs import Job, write_result
from lora_gen_jax.lab.tables.spec import AGENT, UNTRAINED
from lora_gen_jax.models import load_pair
from lora_gen_jax.sharding import evaluation_mesh
from lora_gen_jax.training.checkpoint import versions
from lora_gen_jax.training.loop import train
from lora_gen_jax.training.prepare import with_steps

TAIL_LINES = 15


class TablesStopped(Stopped):
    """The tables were stopped by a signal; what is finished is kept."""

    def __init__(self, received: int):
        super().__init__(received, 0)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}: the same command goes on"


def run_jobs(jobs: Sequence[Job], command: Callable[[Job], Sequence[str]]) -> list[Job]:
    """Runs all jobs and returns those that failed.

    Raises TablesStopped after a signal, when the running job has ended.
    """
    failed = []
    for number, job in enumerate(jobs, 1):
        say(f"{job.name}: starting, {number} of {len(jobs)}; log in {job.log}")
        began = time.monotonic()
        status = run_process(command(job), job)
        seconds = time.monotonic() - began
        how = f"failed with status {status}" if status else "done"
        say(f"{job.name}: {how} in " + (f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"))
        if status:
            failed.append(job)
            lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
            say("\n".join(f"    {line}" for line in [*lines, f"(the whole log: {job.log})"]))
    return failed


def run_process(command: Sequence[str], job: Job) -> int:
    """The status of a job's process, whose output goes to the job's log.

    It runs in a session of its own, so that it receives a signal once, from here; a second signal kills it.
    """
    received: list[int] = []
    job.log.parent.mkdir(parents=True, exist_ok=True)
    own: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
    with job.log.open("a", encoding="utf-8") as log, subprocess.Popen(command, stdout=log, **own) as process:

        def pass_on(number: int, frame: Any) -> None:
            process.send_signal(signal.SIGKILL if received else signal.SIGTERM)
            received.append(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        raise TablesStopped(received[0])
    return status


def end_with_parent() -> None:
    """Ends this process, as SIGTERM would, when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def say(text: str) -> None:
    """Prints a line of progress."""
    print(text, file=sys.stderr, flush=True)


def do(job: Job) -> None:
    """Does what is left of a job in this process."""
    began, inputs = time.monotonic(), job.inputs()
    values = {"inputs": inputs, **(agents(job) if job.run == AGENT else trained_and_scored(job))}
    values |= {"machine": machine(), "versions": versions(), "seconds": round(time.monotonic() - began, 1)}
    write_result(job, values)


def trained_and_scored(job: Job) -> dict[str, Any]:
    """{"shots": {number: {method: scores}}, "seen": {task: whether}, "steps", "trained_parameters"}."""
    config, values = job.config, {"steps": 0, "trained_parameters": 0}
    tasks = evaluated_tasks(config)
    if job.run != UNTRAINED:
        state = train(config)
        values = {"steps": int(state.step), "trained_parameters": sum(x.size for x in jax.tree.leaves(state.params))}
        del state
    pair = load_pair(config, evaluation_mesh(config.mesh.fsdp))
    checkpoints, by_shots = {}, {}
    with unfinished(config.directory, digest_of(json.dumps(list(job.shots)))) as journal:
        for number in job.shots:
            asked = dataclasses.replace(config, eval=dataclasses.replace(config.eval, shots=number))
            methods = job.methods(number)
            checkpoints = checkpoints or ({} if job.run == UNTRAINED else load_checkpoints(asked, methods, None))
            systems = make_systems(asked, methods, pair, checkpoints, tasks)
            results = score_systems(asked, pair, systems, tasks, journal)
            report = report_of(results, tasks)
            by_shots[str(number)] = {
                method: {**scores, "groups": {title: group[method] for title, group in report.items()}}
                for method, scores in results["methods"].items()
            }
    return {"shots": by_shots, "seen": {task.name: task.seen for task in tasks}, **values}


def agents(job: Job) -> dict[str, Any]:
    """{"agent": {method: {"seen" | "unseen": metrics}}, "steps"}; agent.json beside it holds every output."""
    flags = AgentFlags(rows_per_toolset=job.agent_rows, methods=job.agent_methods, limit=job.config.eval.limit)
    tasks = scored_tasks(job.config, flags, False)
    config = with_training_rows(job.config, flags)
    report = score_agents(config, tasks, flags.methods, None, None)
    return {"agent": report["methods"], "steps": with_steps(config).train.steps}
