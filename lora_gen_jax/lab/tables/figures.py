"""Accuracy against latency of all methods: the mean over tasks, and each task (the paper's Figure 1 is ARC-Challenge).

In: results as `tables.results` gathers them, and costs as latency.json holds them. Out: PNGs; none without latencies.
"""

from pathlib import Path

from lora_gen_jax.lab.report.accuracy import MOST_TASKS, draw_means, draw_tasks
from lora_gen_jax.lab.report.scores import Scores
from lora_gen_jax.lab.tables.layout import Costs, Results, answer, method_rows, on_task
from lora_gen_jax.lab.tables.spec import UNTRAINED

MEANS, TASKS = "accuracy.png", "accuracy_tasks.png"


def draw(directory: Path, results: Results, costs: Costs) -> list[Path]:
    """Draws both figures; that of the tasks where there are at most eight.

    The latency of a row is one answer's to the tables' typical prompt, the same for every task.

    Raises:
        OutputError: when one cannot be written.
    """
    tasks, methods = list(results["seen"]), {}
    for row in method_rows(results):
        figures = {task: on_task(results, row, task) for task in tasks}
        if answer(costs, row) is None or None in figures.values():
            continue
        scored = {
            task: {"acc": one.mean / 100, "stderr": (one.error or 0.0) / 100, "latency_ms": answer(costs, row)}
            for task, one in figures.items()
            if one is not None
        }
        methods[row] = {0 if row == UNTRAINED else int(results["shots"]): {"tasks": scored}}
    scores = Scores([], tasks, methods, {})
    if not methods:
        return []
    drawn = [draw_means(scores, directory / MEANS)]
    if len(tasks) <= MOST_TASKS:
        drawn.append(draw_tasks(scores, tasks, directory / TASKS))
    return [path for path in drawn if path is not None]
