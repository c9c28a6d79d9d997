"""After training: the methods of ``compare`` side by side on seen and unseen tasks.

In: a finished run. Methods that learn and have no run yet are trained on the same batches first, each in a directory
of its own inside the run's. Out: results.json, report.json (CONTRACTS), gates.json, report.html and *.png in the run's
directory, and a table on the screen.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_gen_jax.config import Config
from lora_gen_jax.config_check import check, trained
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.controls import check_controls
from lora_gen_jax.evaluation.harness import PREFIX
from lora_gen_jax.evaluation.run import describe, evaluated_tasks, gates_json, score_systems, unfinished
from lora_gen_jax.evaluation.sheet import to_screen
from lora_gen_jax.evaluation.systems import (
    check_methods,
    check_shots,
    checkpoints_needed,
    gates_of,
    load_checkpoints,
    make_systems,
)
from lora_gen_jax.files import write_json
from lora_gen_jax.lab.report.accuracy import draw_comparison
from lora_gen_jax.lab.report.command import write_report
from lora_gen_jax.lab.report.found import prompted
from lora_gen_jax.lab.report.gates import draw_maps
from lora_gen_jax.lab.report.style import evenly, grid, new_figure, save
from lora_gen_jax.lab.report.tables import comparison_sheet
from lora_gen_jax.methods.registry import METHODS
from lora_gen_jax.models import load_pair
from lora_gen_jax.sharding import evaluation_mesh
from lora_gen_jax.training.loop import train
from lora_gen_jax.training.prepare import training_tasks

# Tasks whose gates are drawn.
SHOWN_TASKS = 6


def compare(config: Config) -> dict[str, Any]:
    """Scores `config.compare` and writes the report; returns what report.json holds.

    Raises LoraGenError for tasks that cannot be scored, or as training.
    """
    tasks = evaluated_tasks(config)
    needed = checkpoints_needed()
    for method in dict.fromkeys(needed[m] for m in config.compare):
        if method not in (None, config.method):
            say(f"training {method} on the same batches")
            train(variant(config, method))
    checkpoints = load_checkpoints(config, config.compare, None)
    pair, began = load_pair(config, evaluation_mesh(config.mesh.fsdp)), time.monotonic()
    systems = make_systems(config, config.compare, pair, checkpoints, tasks)
    with unfinished(config.directory, "compare") as journal:
        results = score_systems(config, pair, systems, tasks, journal)
        say(f"scored {len(systems)} methods on {len(tasks)} tasks in {time.monotonic() - began:.0f} s")
        report = report_of(results, tasks)
        gates = gates_of(config, pair, checkpoints, tasks)
        if jax.process_index() == 0:
            results["checkpoints"] = {method: describe(loaded) for method, loaded in checkpoints.items()}
            write_json(config.directory / "results.json", results, "--workdir")
            write_json(config.directory / "report.json", report, "--workdir")
            if gates:
                write_json(config.directory / "gates.json", gates_json(gates), "--workdir")
    if jax.process_index() == 0:
        draw_report(report, gates, config.directory / "report.png")
        to_screen(comparison_sheet(report))
        if gates:
            print(histogram(gates))
        write_report([config.directory])
    return report


def variant(config: Config, method: str) -> Config:
    """The config of a method that the run is compared with, in a directory of its own."""
    if method == config.method:
        return config
    return dataclasses.replace(config.inside(method), method=method, compare=())


def check_comparison(config: Config) -> None:
    """What a comparison needs, before hours of training.

    Raises LoraGenError for an unknown method or task, or a task that cannot be scored.
    """
    check_methods(config.compare, "compare")
    if not config.eval.latency:
        problem = "eval.latency is off, but compare draws accuracy against latency"
        raise ConfigError(problem, field="eval.latency", remedy="leave it on")
    if any(name.startswith(PREFIX) for name in config.eval.tasks):
        remedy = "take them out of eval.tasks, use eval.py"
        raise ConfigError(f"compare cannot score {PREFIX} tasks after training", field="eval.tasks", remedy=remedy)
    check_controls(config.compare, evaluated_tasks(config))
    check_shots(config.compare, [config.eval.shots])
    for method in trained(config):
        made = check(variant(config, method))
        METHODS[method].check(made)
        if METHODS[method].choose_tasks is not None:
            training_tasks(made)


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


def report_of(results: dict[str, Any], tasks: list[Task]) -> dict[str, Any]:
    """{"seen" | "unseen": {method: accuracy, stderr, context_tokens, latency_ms, prompted}}.

    Accuracy is over all queries of the tasks together, with the standard error of a share; context and latency are
    means over tasks.
    """
    report: dict[str, Any] = {}
    for title, seen in (("seen", True), ("unseen", False)):
        names = [task.name for task in tasks if task.seen == seen]
        if names:
            scored = results["methods"].items()
            report[title] = {
                m: pooled([r["tasks"][name] for name in names]) | {"prompted": prompted(m, r)} for m, r in scored
            }
    return report


def pooled(scored: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the report from the results of several tasks; no latency where none was measured."""
    n, times = sum(result["n"] for result in scored), [result["latency_ms"] for result in scored]
    accuracy = sum(result["acc"] * result["n"] for result in scored) / n
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / max(n - 1, 1)),
        "n": n,
        "context_tokens": round(float(np.mean([result["context_tokens"] for result in scored])), 1),
        "latency_ms": None if None in times else round(float(np.mean(times)), 2),
    }


def draw_report(report: dict[str, Any], gates: dict[str, np.ndarray] | None, path: Path) -> None:
    """Accuracy against latency, and the gates of a few tasks where there are gates."""
    shown = evenly(list(gates or {}), SHOWN_TASKS)
    figure: Any = new_figure(13 if shown else 6.5, 5.4)
    left, *right = figure.subfigures(1, 2, width_ratios=(1, 1.2)) if shown else (figure,)
    draw_comparison(left.add_subplot(), report)
    left.legend(loc="outside lower center", ncols=2, fontsize=9)
    if gates and shown:
        draw_maps(right[0], {name: gates[name] for name in shown}, *grid(len(shown), 2))
        right[0].suptitle("what the prompt became", fontsize=10)
    save(figure, path)


def histogram(gates: dict[str, np.ndarray]) -> str:
    """Expert usage: each expert's share of all gates, in percent and as a bar."""
    share_E = np.sum(list(gates.values()), axis=(0, 1))
    share_E = share_E / share_E.sum()
    bars = "▁▂▃▄▅▆▇█"
    drawn = "".join(bars[min(int(s / share_E.max() * len(bars)), len(bars) - 1)] for s in share_E)
    used = int(np.sum(share_E > 0.1 / len(share_E)))
    return (
        f"expert usage {drawn}  {used} of {len(share_E)} experts above a tenth of an even share;"
        f" largest {100 * share_E.max():.0f} %, smallest {100 * share_E.min():.1f} %"
    )
