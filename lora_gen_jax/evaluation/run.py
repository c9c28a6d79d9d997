"""eval.py: methods times tasks, a table on the screen and ``results.json``.

In: a config, a checkpoint for the methods that need one. Out: results as CONTRACTS: per method and task, with AVE
and HAR.
"""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import to_json
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.pocket import suite
from lora_gen_jax.data.reasoning import REASONING_TASKS
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.evaluation.systems import check_methods, load_checkpoints, make_systems
from lora_gen_jax.evaluation.task import System, evaluate_task, scored_documents, summary
from lora_gen_jax.files import check_output, complete_directory
from lora_gen_jax.models import Pair, load_pair
from lora_gen_jax.training.checkpoint import Loaded, versions

# With more tasks the table has one column for all seen and one for all unseen tasks.
WIDEST_TABLE = 10


def evaluate(config: Config, checkpoint: Path | None, out: Path) -> dict[str, Any]:
    """Scores the config's methods on its tasks and writes `out`/results.json.

    Raises:
        LoraGenError: for an unknown method or task, a missing checkpoint, or an `out` that holds something; before
            anything is scored.
    """
    check_output(out)
    check_methods(config.eval.methods, "eval.methods")
    checkpoints = load_checkpoints(config, config.eval.methods, checkpoint)
    tasks = evaluated_tasks(config)
    pair = load_pair(config)
    systems = make_systems(config, config.eval.methods, pair, checkpoints, tasks)
    results = score_systems(config, pair, systems, tasks)
    results["checkpoints"] = {method: describe(loaded) for method, loaded in checkpoints.items()}
    with complete_directory(out) as temporary:
        (temporary / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_table(results, tasks)
    return results


def evaluated_tasks(config: Config) -> list[Task]:
    """The tasks of eval.tasks, or all eight reasoning tasks; each has documents that can be scored.

    Raises:
        DataError: for an unknown task or one that cannot be scored.
    """
    names, d = config.eval.tasks or tuple(REASONING_TASKS), config.data
    found = load_tasks(names, d.dir, d.tfds_dir, d.files)
    # A user's files may hold more tasks than are named; a group's name stands for its tasks.
    groups = [[found[name]] if name in found else suite.find(name) for name in names]
    chosen = list({task.name: task for group in groups for task in group}.values())
    for task in chosen:
        scored_documents(task, config.eval)
    return chosen


def score_systems(config: Config, pair: Pair, systems: dict[str, System], tasks: list[Task]) -> dict[str, Any]:
    """Results of every system on every task, as results.json holds them."""
    results: dict[str, Any] = {
        "config": to_json(config),
        "versions": versions(),
        "machine": machine(),
        "methods": {},
    }
    console = Console(file=sys.stderr)
    for method, system in systems.items():
        scored = {}
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            line = bar.add_task(method, total=len(tasks))
            for number, task in enumerate(tasks):

                def move(done: int, total: int, number: int = number, name: str = task.name, line: Any = line) -> None:
                    bar.update(line, completed=number + done / total, description=f"{method} {name}")  # noqa: B023

                scored[task.name] = evaluate_task(pair.edge, task, system, config.eval, move)
        results["methods"][method] = {"tasks": scored, **summary(scored, {task.name: task.seen for task in tasks})}
        if not console.is_terminal:
            console.print(f"{method}: AVE {results['methods'][method]['ave']:.4f}", highlight=False)
    return results


def describe(loaded: Loaded) -> dict[str, Any]:
    """Which checkpoint was scored."""
    return {"path": str(loaded.path), "step": loaded.step, "fingerprints": loaded.fingerprints}


def machine() -> dict[str, Any]:
    """What the latencies were measured on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def print_table(results: dict[str, Any], tasks: list[Task]) -> None:
    """Methods as rows, tasks as columns: acc ± standard error in percent."""
    wide = len(tasks) <= WIDEST_TABLE
    table = Table(title="acc % ± standard error; AVE and HAR are the mean and the harmonic mean")
    table.add_column("method")
    for task in tasks if wide else ():
        table.add_column(f"{task.name}\n{'seen' if task.seen else 'unseen'}", justify="right")
    if not wide:
        for title, seen in (("seen", True), ("unseen", False)):
            table.add_column(f"AVE of {sum(t.seen == seen for t in tasks)}\n{title} tasks", justify="right")
    for title in ("AVE", "HAR", "context\ntokens", "latency\nms"):
        table.add_column(title, justify="right")
    for method, result in results["methods"].items():
        scored = result["tasks"].values()
        cells = [f"{100 * r['acc']:.1f} ± {100 * r['stderr']:.1f}" for r in scored]
        if not wide:
            means = (result["ave_seen"], result["ave_unseen"])
            cells = ["–" if mean is None else f"{100 * mean:.1f}" for mean in means]
        cells += [f"{100 * result['ave']:.1f}", f"{100 * result['har']:.1f}"]
        cells += [f"{sum(r[column] for r in scored) / len(scored):.1f}" for column in ("context_tokens", "latency_ms")]
        table.add_row(method, *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
