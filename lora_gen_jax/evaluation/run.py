"""eval.py: methods times tasks, a table on the screen and ``results.json``.

In: a config, a checkpoint for the methods that need one. Out: results as CONTRACTS: per method and task, with AVE
and HAR.
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import Config
from lora_gen_jax.config_file import to_json
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.reasoning import REASONING_TASKS
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.reasoning import System, evaluate_task, scored_documents, summary
from lora_gen_jax.files import check_output, complete_directory
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.models import Pair, load_pair, make_generator
from lora_gen_jax.training.checkpoint import Loaded, check_models, load_checkpoint, versions

METHODS = ("base", "icl", "lora_gen")


def evaluate(config: Config, checkpoint: Path | None, out: Path) -> dict[str, Any]:
    """Scores the config's methods on its tasks and writes `out`/results.json.

    Raises:
        LoraGenError: for an unknown method or task, a missing checkpoint, or an `out` that holds something; before
            anything is scored.
    """
    check_output(out)
    if not config.eval.methods:
        raise ConfigError(f"eval.methods is empty; name some of {', '.join(METHODS)}")
    for method in config.eval.methods:
        if method not in METHODS:
            raise ConfigError(f"eval.methods has {method!r}; the methods are {', '.join(METHODS)}")
    names = config.eval.tasks or tuple(REASONING_TASKS)
    loaded = load_checkpoint(checkpoint or config.directory) if "lora_gen" in config.eval.methods else None
    tasks = load_tasks(names, config.data.dir, config.data.tfds_dir, config.data.files)
    for name in names:
        scored_documents(tasks[name], config.eval)
    pair = load_pair(config)
    systems = {method: make_system(method, pair, loaded, config) for method in config.eval.methods}
    results: dict[str, Any] = {
        "config": to_json(config),
        "checkpoint": None if loaded is None else {"step": loaded.step, "fingerprints": loaded.fingerprints},
        "versions": versions(),
        "machine": machine(),
        "methods": {},
    }
    console = Console(file=sys.stderr)
    for method, system in systems.items():
        scored = {}
        for name in names:
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
                scored[name] = evaluate_task(pair.edge, tasks[name], system, config.eval, follow(bar, method, name))
            if not console.is_terminal:
                console.print(f"{method} {name}: acc {scored[name]['acc']:.4f}", highlight=False)
        seen = {name: tasks[name].seen for name in names}
        results["methods"][method] = {"tasks": scored, **summary(scored, seen)}
    with complete_directory(out) as temporary:
        (temporary / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_table(results, tasks)
    return results


def make_system(method: str, pair: Pair, loaded: Loaded | None, config: Config) -> System:
    """How a method makes the edge model's weights for a task.

    Raises:
        CheckpointError: when the checkpoint was trained on other models.
    """
    base = pair.edge.params
    if method in ("base", "icl"):
        return System(lambda prompt: base, reads_prompt=method == "icl")
    assert loaded is not None
    check_models(loaded.fingerprints, pair.fingerprints, f"checkpoint {loaded.path}")
    generator = make_generator(loaded.config, pair)

    def specialised(prompt: str | None) -> Any:
        if prompt is None:
            return base
        ids = pair.cloud.encoder.text(prompt)
        made = specialize(generator, loaded.variables, pair.cloud.params, [ids], config.eval.prompt_limit)
        return merge(base, made.adapter.select(0))

    return System(specialised)


def follow(bar: Progress, method: str, name: str) -> Callable[[int, int], None]:
    """A callback that moves a progress bar."""
    task = bar.add_task(f"{method} {name}", total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


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


def print_table(results: dict[str, Any], tasks: dict[str, Task]) -> None:
    """Methods as rows, tasks as columns: acc ± standard error in percent."""
    table = Table(title="acc % ± standard error; AVE and HAR are the mean and the harmonic mean")
    first = next(iter(results["methods"].values()))
    table.add_column("method")
    for name in first["tasks"]:
        table.add_column(f"{name}\n{'seen' if tasks[name].seen else 'unseen'}", justify="right")
    for title in ("AVE", "HAR", "context\ntokens", "latency\nms"):
        table.add_column(title, justify="right")
    for method, result in results["methods"].items():
        scored = result["tasks"].values()
        cells = [f"{100 * r['acc']:.1f} ± {100 * r['stderr']:.1f}" for r in scored]
        cells += [f"{100 * result['ave']:.1f}", f"{100 * result['har']:.1f}"]
        cells += [f"{sum(r[column] for r in scored) / len(scored):.1f}" for column in ("context_tokens", "latency_ms")]
        table.add_row(method, *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
