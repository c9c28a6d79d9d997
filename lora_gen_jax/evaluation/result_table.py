"""Results on the screen.

In: what results.json holds. Out: tables.
"""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_gen_jax.data.reasoning import REASONING_TASKS
from lora_gen_jax.evaluation.published import MACHINE, REASONING

TITLES = {True: "seen", False: "unseen", None: "lm-eval"}
# With more tasks the table has one column for all seen and one for all unseen tasks.
WIDEST_TABLE = 10


def print_table(results: dict[str, Any], seen: dict[str, bool | None], title: str) -> None:
    """Methods as rows, tasks as columns, seen ones first: acc ± standard error in percent, as the paper's Table 2.

    Where all eight reasoning tasks were scored, the paper's own figures follow in a table of their own.
    """
    wide = len(seen) <= WIDEST_TABLE
    tasks = sorted(seen, key=lambda task: not seen[task])
    table = Table(title=f"acc % ± standard error, {title}; AVE and HAR are the mean and the harmonic mean")
    table.add_column("method")
    for task in tasks if wide else ():
        table.add_column(f"{task}\n{TITLES[seen[task]]}", justify="right")
    for mean, kind in (("AVE", True), ("AVE", False), ("HAR", False)):
        table.add_column(f"{mean}\n{sum(seen[t] is kind for t in tasks)} {TITLES[kind]}", justify="right")
    for text in ("AVE", "HAR", "context\ntokens", "latency\nms"):
        table.add_column(text, justify="right")
    for method, result in results["methods"].items():
        scored = [result["tasks"][task] for task in tasks]
        cells = [share_of(r) for r in scored] if wide else []
        means = (result[name] for name in ("ave_seen", "ave_unseen", "har_unseen", "ave", "har"))
        cells += ["–" if mean is None else f"{100 * mean:.1f}" for mean in means]
        cells += [mean_of([r[column] for r in scored]) for column in ("context_tokens", "latency_ms")]
        table.add_row(method, *cells)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    if set(tasks) == set(REASONING_TASKS):
        console.print(published_table())
    elif len(tasks) > 1:
        console.print(score_table(results["methods"]))


def score_table(methods: dict[str, Any]) -> Table:
    """Methods as rows, all tasks and those of every source as columns: the mean score and its interval in percent."""
    table = Table(title="score %, its 95 % interval over tasks: accuracy, or ROUGE-L where answers are long")
    table.add_column("method")
    first = next(iter(methods.values()))
    sources = list(first["groups"]) if len(first["groups"]) > 1 else []
    for title, found in (("all", first["mean"]), *((source, first["groups"][source]) for source in sources)):
        table.add_column(f"{title}\n{found['tasks']} tasks", justify="right")
    for method, result in methods.items():
        table.add_row(method, *map(score_cell, (result["mean"], *(result["groups"][source] for source in sources))))
    return table


def score_cell(found: dict[str, Any]) -> str:
    """A mean and its interval, where there is one."""
    ends = found["interval"]
    return f"{100 * found['score']:.1f}" + (f" ({100 * ends[0]:.1f}–{100 * ends[1]:.1f})" if ends else "")


def share_of(result: dict[str, Any]) -> str:
    """Accuracy and its standard error, where there is one, in percent."""
    error = result["stderr"]
    return f"{100 * result['acc']:.1f} ± {'–' if error is None else f'{100 * error:.1f}'}"


def mean_of(figures: Sequence[float | None], digits: int = 1) -> str:
    """The mean of the figures that were measured, as a table shows it."""
    measured = [figure for figure in figures if figure is not None]
    return f"{sum(measured) / len(measured):.{digits}f}" if measured else "–"


def published_table() -> Table:
    """The paper's figures on the same eight tasks: other models, another machine."""
    table = Table(title=f"published by the paper (Table 2, 5 shots, {MACHINE}); not measured here")
    for text in ("edge model", "method", "AVE", "HAR", "latency ms"):
        table.add_column(text, justify="left" if text in ("edge model", "method") else "right")
    for row in REASONING:
        if row.har is not None:
            table.add_row(row.model, row.method, f"{row.ave:.1f}", f"{row.har:.1f}", f"{row.latency_ms:.1f}")
    return table
