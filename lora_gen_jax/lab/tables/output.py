"""Gathering what finished jobs left, and printing and writing the tables with what they cost to answer.

In: `Tables` and their jobs. Out: tables on standard output, tables.json, tables.md and figures. They are written before
costs are measured, which may fail, and again afterwards.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lora_gen_jax.config_file import to_json as settings_json
from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.evaluation.means import summary
from lora_gen_jax.evaluation.sheet import Sheet, to_json, to_markdown, to_screen
from lora_gen_jax.files import complete_directory, write_json, write_text
from lora_gen_jax.lab.report.accuracy import MOST_TASKS, draw_means, draw_tasks
from lora_gen_jax.lab.report.found import Scores
from lora_gen_jax.lab.tables import latency
from lora_gen_jax.lab.tables.jobs import Job, finished
from lora_gen_jax.lab.tables.layout import Costs, Results, all_tables, answer, foot, method_rows, on_task
from lora_gen_jax.lab.tables.run import say
from lora_gen_jax.lab.tables.spec import AGENT, UNTRAINED, Tables
from lora_gen_jax.methods.registry import METHODS

MARKDOWN, VALUES, MEANS, TASKS = "tables.md", "tables.json", "accuracy.png", "accuracy_tasks.png"
FACTS = ("steps", "trained_parameters", "seconds")


def write_tables(tables: Tables, jobs: Sequence[Job], out: Path | None) -> bool:
    """Measures costs, prints the tables and writes them; whether the costs could be measured.

    Args:
        tables: these.
        jobs: all of them; those that are not finished leave dashes.
        out: directory to write, complete or not at all; the work directory when None.
    """
    results = gather(jobs)
    if not results["facts"]:
        return True
    rows = latency.timed_rows(tables, results["facts"])
    costs, failure = latency.kept_costs(tables, rows), None
    if out is None:
        tables.directory.mkdir(parents=True, exist_ok=True)
        write(tables.directory, results, costs)
    else:
        with complete_directory(out) as temporary:
            write(temporary, results, costs)
    out = out or tables.directory
    try:
        costs = latency.measure_costs(tables, rows)
    except (LoraGenError, jax.errors.JaxRuntimeError) as error:
        # What was measured until then counts.
        costs, failure = latency.kept_costs(tables, rows), error
    to_screen(*write(out, results, costs), width=200)
    print("\n".join(foot(results, costs)))
    draw(out, results, costs)
    if failure is not None:
        say(f"costs cannot be measured: {failure}")
    say(f"tables: {out / MARKDOWN}")
    return failure is None


def write(directory: Path, results: dict[str, Any], costs: dict[str, Any]) -> list[Sheet]:
    """Writes both files, each replaced at once, and returns the tables."""
    sheets = all_tables(results, costs, {name: method.traits for name, method in METHODS.items()})
    write_json(directory / VALUES, {"tables": [*map(to_json, sheets)], "results": results, "costs": costs})
    write_text(directory / MARKDOWN, to_markdown(sheets, foot(results, costs)))
    return sheets


def draw(directory: Path, results: Results, costs: Costs) -> list[Path]:
    """Draws accuracy against latency: the mean over tasks, and each task where there are at most eight.

    The latency of a row is that of one answer to the tables' typical prompt, the same for every task. The paper's
    Figure 1 is ARC-Challenge.
    """
    tasks, methods = list(results["seen"]), {}
    for row in method_rows(results):
        found, latency_ms = {task: on_task(results, row, task) for task in tasks}, answer(costs, row)
        known = {task: one for task, one in found.items() if one is not None}
        if latency_ms is None or len(known) < len(tasks):
            continue
        scored = {
            task: {"acc": one.mean / 100, "stderr": (one.error or 0.0) / 100, "latency_ms": latency_ms}
            for task, one in known.items()
        }
        methods[row] = {0 if row == UNTRAINED else int(results["shots"]): {"tasks": scored}}
    if not methods:
        return []
    scores = Scores([], tasks, methods, {})
    drawn = [draw_means(scores, directory / MEANS)]
    if len(tasks) <= MOST_TASKS:
        drawn.append(draw_tasks(scores, tasks, directory / TASKS))
    return [path for path in drawn if path is not None]


def gather(jobs: Sequence[Job]) -> dict[str, Any]:
    """The results of the finished jobs, as one plain dictionary that the tables are made from.

    {"settings": {run: config}, "runs": {row: {seed: {shots: scores}}}, "seen": {task: whether}, "facts": {run: {seed:
    `FACTS`}}, "agent": {seed: {method: {group: metrics}}}, "machines": [{"machine", "runs"}], "versions":
    [{"versions", "runs"}], "seeds", "shots"}. Seeds and numbers of shots are texts, as in JSON.
    """
    found: dict[str, Any] = {"settings": {}, "runs": {}, "seen": {}, "facts": {}, "agent": {}}
    found |= {"machines": [], "versions": [], "shots": str(max((max(job.shots) for job in jobs), default=0))}
    found["seeds"] = list(dict.fromkeys(str(job.seed) for job in jobs))
    for job in jobs:
        found["settings"].setdefault(job.run, settings_json(job.config))
        if (result := finished(job)) is None:
            continue
        seed = str(job.seed)
        found["facts"].setdefault(job.run, {})[seed] = {name: result[name] for name in FACTS if name in result}
        for name, places in (("machine", found["machines"]), ("versions", found["versions"])):
            same = next((place for place in places if place[name] == result[name]), None)
            if same is None:
                places.append(same := {name: result[name], "runs": []})
            same["runs"] = list(dict.fromkeys((*same["runs"], job.run)))
        if job.run == AGENT:
            found["agent"][seed] = {name: one for name, one in result["agent"].items() if name in job.agent_methods}
            continue
        found["seen"] |= result["seen"]
        for number, methods in result["shots"].items():
            for method, scores in methods.items():
                row = method if job.run == UNTRAINED else job.run
                means = summary(scores["tasks"], result["seen"])  # an older result lacks some
                found["runs"].setdefault(row, {}).setdefault(seed, {})[number] = means | scores
    return found
