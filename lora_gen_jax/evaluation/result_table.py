"""Results on the screen. In: what results.json holds. Out: tables."""

from typing import Any

from lora_gen_jax.data.reasoning import REASONING_TASKS
from lora_gen_jax.evaluation import published
from lora_gen_jax.evaluation.sheet import Cell, Sheet, average, percent, to_screen

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
