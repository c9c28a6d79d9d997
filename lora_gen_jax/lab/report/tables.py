"""The tables of a report. In: scores and the other files. Out: sheets, with units in their headings."""

import statistics
from collections.abc import Mapping
from typing import Any

from lora_gen_jax.evaluation import published
from lora_gen_jax.evaluation.sheet import Cell, Sheet, average, number, percent, ratio
from lora_gen_jax.lab.report.found import Scores, mean_point, prompted
from lora_gen_jax.lab.report.style import title_of
from lora_gen_jax.methods.registry import FULL_PROMPT

PUBLISHED = (published.table_2, published.table_3, published.table_4, published.table_13)
_TIMES = {
    "context_tokens": ("edge reads, tokens", 0),
    "kept_tokens": ("kept before, tokens", 0),
    "first_token_ms": ("first token, ms", 2),
    "per_token_ms": ("each later token, ms", 2),
    "answer_ms": ("answer, ms", 2),
    "first_answer_ms": ("first answer with what is done once, ms", 2),
    "latency_ms": ("latency, ms", 2),
}


def score_sheet(scores: Scores) -> Sheet:
    """A row for each method and number of shots."""
    points = {m: {s: mean_point(r, scores.tasks, s) for s, r in of.items()} for m, of in scores.methods.items()}
    rows = []
    for method, of in scores.methods.items():
        for shots, result in sorted(of.items()):
            point = points[method][shots]
            full = points.get(FULL_PROMPT.key, {}).get(shots) if prompted(method, result) else None
            means = [percent(result.get(name)) for name in ("har", "ave_seen", "ave_unseen", "har_unseen")]
            cells: list[Cell] = [title_of(method, result), str(shots), percent(point.accuracy, point.stderr), *means]
            cells += [number(point.context), None, number(point.latency_ms, 2), None]
            if full is not None and full is not point:
                cells[-3], cells[-1] = ratio(full.context, point.context), ratio(full.latency_ms, point.latency_ms)
            rows.append(cells)
    columns = ("method", "shots", "AVE, %", "HAR, %", "AVE of seen tasks, %", "AVE of unseen tasks, %")
    columns += ("HAR of unseen tasks, %", "edge context, tokens", "compression", "latency, ms", "speed-up")
    title = (
        f"Means over {len(scores.tasks)} tasks ± the standard error of the mean; HAR is the harmonic mean. Compression"
        " and speed-up are against in-context learning with as many shots."
    )
    return Sheet(title, columns, rows)


def task_sheet(scores: Scores) -> Sheet:
    """A row for each task, a column for each method and number of shots."""
    found = [(method, shots, result) for method, of in scores.methods.items() for shots, result in sorted(of.items())]
    several = any(len(of) > 1 for of in scores.methods.values())
    rows = []
    for task in scores.tasks:
        own = [result["tasks"][task] for _, _, result in found]
        rows.append([task, str(own[0].get("n", "–")), *(percent(r["acc"], r.get("stderr")) for r in own)])
    titles = [title_of(method, result) + (f", {shots} shots" if several else "") for method, shots, result in found]
    title = "Accuracy of every task in % ± standard error over its documents."
    return Sheet(title, ["task", "documents", *titles], rows)


def comparison_sheet(report: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Sheet:
    """A report.json."""
    groups = list(report)
    if not all(report.values()):
        raise KeyError("a group has no methods")
    first = report[groups[0]]
    full = [report[group][FULL_PROMPT.key]["context_tokens"] for group in groups] if FULL_PROMPT.key in first else []
    rows = []
    for method in first:
        found = [report[group][method] for group in groups]
        context = statistics.fmean(r["context_tokens"] for r in found)
        short = full and method != FULL_PROMPT.key and prompted(method, found[0])
        cells = [percent(r["accuracy"], r.get("stderr")) for r in found]
        cells += [number(context), ratio(statistics.fmean(full), context) if short else None]
        rows.append([title_of(method, found[0]), *cells, average((r["latency_ms"] for r in found), 2)])
    columns = [
        "method",
        *(f"{group}\ntasks, %" for group in groups),
        "edge context,\ntokens",
        "compression",
        "latency,\nms",
    ]
    title = "Accuracy over all queries ± standard error; latency is one answer with its whole context."
    return Sheet(title, columns, rows)


def efficiency_sheet(values: Mapping[str, Any]) -> Sheet | None:
    """The systems of an efficiency.json; columns that no system has are left out."""
    systems = {**_objects(values.get("methods")), **_objects((values.get("transformers") or {}).get("systems"))}
    columns = {key: what for key, what in _TIMES.items() if any(key in s for s in systems.values())}
    if not columns:
        return None
    rows = [[title_of(m), *(number(s.get(key), d) for key, (_, d) in columns.items())] for m, s in systems.items()]
    title = "One answer at a time; medians over the repetitions."
    return Sheet(title, ["system", *(text for text, _ in columns.values())], rows)


def _objects(values: Any) -> dict[str, Any]:
    """The entries that are objects; none of anything else."""
    return {k: v for k, v in values.items() if isinstance(v, dict)} if isinstance(values, dict) else {}
