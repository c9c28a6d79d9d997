"""eval.py: methods times tasks, tables on the screen and ``results.json``.

In: a config, a checkpoint for the methods that need one. Out: results as CONTRACTS: per method and task, with AVE
and HAR.
"""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import to_json
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.pocket import suite
from lora_gen_jax.data.reasoning import REASONING_TASKS
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.evaluation import harness, published
from lora_gen_jax.evaluation.means import scores, summary
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.sheet import Cell, Sheet, average, percent, to_screen
from lora_gen_jax.evaluation.subject import content_of, digest_of
from lora_gen_jax.evaluation.systems import check_methods, check_shots, gates_of, load_checkpoints, make_systems
from lora_gen_jax.evaluation.task import System, check_lengths, evaluate_task, scored_documents
from lora_gen_jax.files import check_output, complete_directory, write_json, writing
from lora_gen_jax.models import Pair, load_pair
from lora_gen_jax.sharding import evaluation_mesh
from lora_gen_jax.training import distributed
from lora_gen_jax.training.checkpoint import Loaded, versions


def evaluate(config: Config, checkpoint: Path | None, out: Path, shots: Sequence[int] = ()) -> dict[str, Any]:
    """Scores the config's methods on its tasks and writes `out`/results.json, and gates.json where there are gates.

    What is finished is kept in the work directory until all is: an evaluation that was stopped goes on there. Of
    several processes each evaluates everything, and the first writes.

    Args:
        config: eval.methods, eval.tasks and so on.
        checkpoint: of the config's method; as `find_checkpoint` where it is None.
        out: directory to write.
        shots: numbers of shots, instead of eval.shots; results of each stand under "by_shots", those of the largest
            also where results of one number stand.

    Raises:
        LoraGenError: for an unknown method or task, a missing checkpoint, or an `out` that holds something; before
            anything is scored.
    """
    check_output(out)
    if jax.process_count() > 1:
        # The first may have written it before another looks.
        distributed.barrier()
    check_methods(config.eval.methods, "eval.methods")
    check_shots(config.eval.methods, shots or [config.eval.shots])
    foreign = [name for name in config.eval.tasks if name.startswith(harness.PREFIX)]
    harness.check_harness(config.eval.methods, foreign)
    checkpoints = load_checkpoints(config, config.eval.methods, checkpoint)
    tasks = evaluated_tasks(config)
    pair = load_pair(config, evaluation_mesh(config.mesh.fsdp))
    by_shots: dict[str, Any] = {}
    results: dict[str, Any] = {}
    asked = [to_json(config), {m: content_of(loaded.variables) for m, loaded in checkpoints.items()}, list(shots)]
    with unfinished(config.directory, digest_of(json.dumps(asked, sort_keys=True))) as journal:
        for number in sorted(set(shots)) or [config.eval.shots]:
            config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, shots=number))
            systems = make_systems(config, config.eval.methods, pair, checkpoints, tasks)
            results = score_systems(config, pair, systems, tasks, journal)
            seen: dict[str, bool | None] = {task.name: task.seen for task in tasks}
            if foreign:
                more = harness.harness_scores(config, pair, checkpoints, foreign, journal)
                add(results, more, seen, systems, {task.name: task.source for task in tasks})
            by_shots[str(number)] = results["methods"]
            if jax.process_index() == 0:
                print_table(results, seen, f"{number} shots, {config.eval.split} rows")
        results["checkpoints"] = {method: describe(loaded) for method, loaded in checkpoints.items()}
        if len(by_shots) > 1:
            results["by_shots"] = by_shots
        gates = gates_of(config, pair, checkpoints, tasks)
        if jax.process_index() == 0:
            with complete_directory(out) as temporary, writing(out):
                write_json(temporary / "results.json", results)
                if gates:
                    (temporary / "gates.json").write_text(json.dumps(gates_json(gates)) + "\n", encoding="utf-8")
    return results


def add(
    results: dict[str, Any],
    more: dict[str, dict[str, dict]],
    seen: dict[str, bool | None],
    systems: Mapping[str, System],
    sources: Mapping[str, str],
) -> None:
    """Adds results of lm-eval's tasks to those of our own; most of them count neither as seen nor as unseen."""
    for method, tasks in more.items():
        seen |= {task: harness.seen_of(task) for task in tasks}
        before = results["methods"].get(method, {"tasks": {}, "prompted": systems[method].prompted})
        scored = before["tasks"] | tasks
        means = summary(scored, seen) | scores(scored, {**dict.fromkeys(tasks, "lm-eval"), **sources})
        results["methods"][method] = {**before, "tasks": scored, **means}


@contextmanager
def unfinished(workdir: Path, name: str) -> Iterator[RequestCache]:
    """A journal of finished requests in a work directory; removed when the block ends without an error.

    Args:
        workdir: of the run.
        name: what is evaluated: the same command finds its journal again, and no other one does.

    Raises:
        OutputError: when it cannot be written.
    """
    if jax.process_index():
        yield RequestCache(None, name)
        return
    journal = RequestCache(workdir / ".unfinished", name, "give another --workdir")
    yield journal
    assert journal.path is not None
    journal.path.unlink(missing_ok=True)
    with suppress(OSError):  # unless there are journals of other evaluations, or a run
        journal.path.parent.rmdir()
        workdir.rmdir()


def gates_json(gates: dict[str, np.ndarray]) -> dict[str, Any]:
    """What gates.json holds: the gates [L, E] of every task, to six digits."""
    return {"tasks": {task: np.round(gates_LE, 6).tolist() for task, gates_LE in gates.items()}}


def evaluated_tasks(config: Config) -> list[Task]:
    """The tasks of eval.tasks but lm-eval's, or all eight reasoning tasks; each has documents that can be scored.

    With `eval.split` "validation" those documents are the validation rows, in the place of the test rows.

    Raises DataError for an unknown task or one that cannot be scored.
    """
    names, d = config.eval.tasks or tuple(REASONING_TASKS), config.data
    names = [name for name in names if not name.startswith(harness.PREFIX)]
    found = load_tasks(names, d.dir, d.tfds_dir, d.files)
    # A user's files may hold more tasks than are named; a group's name stands for its tasks.
    groups = [[found[name]] if name in found else suite.find(name) for name in names]
    chosen = list({task.name: task for group in groups for task in group}.values())
    if config.eval.split == "validation":
        chosen = [dataclasses.replace(task, test=task.validation, validation=task.test) for task in chosen]
    for task in chosen:
        scored_documents(task, config.eval)
    return chosen


def score_systems(
    config: Config, pair: Pair, systems: dict[str, System], tasks: list[Task], journal: RequestCache | None = None
) -> dict[str, Any]:
    """Results of every system on every task, as results.json holds them; finished requests are kept in `journal`.

    Raises DataError as `check_lengths`, before anything is scored.
    """
    results: dict[str, Any] = {
        "config": to_json(config),
        "versions": versions(),
        "machine": machine(),
        "methods": {},
    }
    console = Console(file=sys.stderr)
    check_lengths(pair, systems, tasks, config.eval)
    for method, system in systems.items() if tasks else ():
        scored = {}
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            line = bar.add_task(method, total=len(tasks))
            for number, task in enumerate(tasks):

                def move(done: int, total: int, number: int = number, name: str = task.name, line: Any = line) -> None:
                    bar.update(line, completed=number + done / total, description=f"{method} {name}")  # noqa: B023

                scored[task.name] = evaluate_task(pair.edge, task, system, config.eval, journal, move)
        means = summary(scored, {task.name: task.seen for task in tasks})
        means |= scores(scored, {task.name: task.source for task in tasks})
        results["methods"][method] = {"tasks": scored, **means, "prompted": system.prompted}
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


TITLES = {True: "seen", False: "unseen", None: "lm-eval"}
# With more tasks the table has one column for all seen and one for all unseen tasks.
WIDEST_TABLE = 10


def print_table(results: dict[str, Any], seen: dict[str, bool | None], title: str) -> None:
    """Methods as rows, tasks as columns, seen ones first: acc ± standard error in percent, as the paper's Table 2.

    Where all eight reasoning tasks were scored, the paper's own figures follow in a table of their own.
    """
    sheets = [result_sheet(results["methods"], seen, title)]
    if set(seen) == set(REASONING_TASKS):
        sheets.append(published.table_2())
    elif len(seen) > 1:
        sheets.append(score_sheet(results["methods"]))
    to_screen(*sheets, width=200)


def result_sheet(methods: dict[str, Any], seen: dict[str, bool | None], title: str) -> Sheet:
    """Accuracies and their means, tokens in the context, and latency."""
    tasks = sorted(seen, key=lambda task: not seen[task])
    columns = [f"{task}\n{TITLES[seen[task]]}" for task in tasks] if len(seen) <= WIDEST_TABLE else []
    counts = {kind: sum(seen[task] is kind for task in tasks) for kind in (True, False)}
    averages = [
        f"{mean}\n{counts[kind]} {TITLES[kind]}" for mean, kind in (("AVE", True), ("AVE", False), ("HAR", False))
    ]
    rows = []
    for method, result in methods.items():
        scored = [result["tasks"][task] for task in tasks]
        cells: list[Cell] = [percent(r["acc"], r["stderr"]) for r in scored] if columns else []
        cells += [percent(result[name]) for name in ("ave_seen", "ave_unseen", "har_unseen", "ave", "har")]
        cells += [average(r[name] for r in scored) for name in ("context_tokens", "latency_ms")]
        rows.append((method, *cells))
    headings = ("method", *columns, *averages, "AVE", "HAR", "context\ntokens", "latency\nms")
    return Sheet(f"acc % ± standard error, {title}; AVE and HAR are the mean and the harmonic mean", headings, rows)


def score_sheet(methods: dict[str, Any]) -> Sheet:
    """Methods as rows, all tasks and those of every source as columns: the mean score and its interval in percent."""
    first = next(iter(methods.values()))
    sources = list(first["groups"]) if len(first["groups"]) > 1 else []
    found = {m: [result["mean"], *(result["groups"][source] for source in sources)] for m, result in methods.items()}
    counts = [one["tasks"] for one in next(iter(found.values()))]
    columns = [f"{title}\n{count} tasks" for title, count in zip(("all", *sources), counts, strict=True)]
    rows = [(method, *map(score_cell, own)) for method, own in found.items()]
    title = "score %, its 95 % interval over tasks: accuracy, or ROUGE-L where answers are long"
    return Sheet(title, ("method", *columns), rows)


def score_cell(found: dict[str, Any]) -> str:
    """A mean and its interval, where there is one."""
    ends = found["interval"]
    return f"{100 * found['score']:.1f}" + (f" ({100 * ends[0]:.1f}–{100 * ends[1]:.1f})" if ends else "")
