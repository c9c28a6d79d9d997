"""The tables of a report. In: scores and the other files. Out: `Table`s of plain text, units in their headings."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_gen_jax.evaluation import published
from lora_gen_jax.lab.agent.table import METHODS
from lora_gen_jax.lab.report.scores import Point, Scores, mean_point, prompted
from lora_gen_jax.lab.report.style import title_of

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Text in rows.

    Attributes:
        caption: what the figures are.
        headings: of the columns; the first column names the row.
        rows: cells in the order of the headings.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def percent(value: float | None, error: float | None = None) -> str:
    """97.0 ± 1.3, or a dash."""
    if value is None:
        return NONE
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error else "")


def number(value: Any, digits: int = 1) -> str:
    """With so many decimals, or a dash where it is no number."""
    return f"{value:,.{digits}f}" if isinstance(value, int | float) and not isinstance(value, bool) else NONE


def ratio(above: float | None, below: float | None) -> str:
    """36.1×, or a dash."""
    return f"{above / below:.1f}×" if above and below else NONE


def score_table(scores: Scores) -> Table:
    """A row for each method and number of shots."""
    points = {m: {s: mean_point(r, scores.tasks, s) for s, r in of.items()} for m, of in scores.methods.items()}
    rows = []
    for method, of in scores.methods.items():
        for shots in sorted(of):
            point, result = points[method][shots], of[shots]
            full = points.get("icl", {}).get(shots) if prompted(method, result) else None
            rows.append([title_of(method, result), *_score_cells(point, result, full)])
    headings = [
        "method", "shots", "AVE, %", "HAR, %", "AVE of seen tasks, %", "AVE of unseen tasks, %",
        "HAR of unseen tasks, %",
        "edge context, tokens", "compression", "latency, ms", "speed-up",
    ]  # fmt: skip
    caption = (
        f"Means over {len(scores.tasks)} tasks ± the standard error of the mean; HAR is the harmonic mean. Compression"
        " and speed-up are against in-context learning with as many shots."
    )
    return Table(caption, headings, rows)


def _score_cells(point: Point, result: Mapping[str, Any], full: Point | None) -> list[str]:
    return [
        str(point.shots),
        percent(point.accuracy, point.stderr),
        percent(result.get("har")),
        percent(result.get("ave_seen")),
        percent(result.get("ave_unseen")),
        percent(result.get("har_unseen")),
        number(point.context),
        ratio(full.context, point.context) if full and full is not point else NONE,
        number(point.latency_ms, 2),
        ratio(full.latency_ms, point.latency_ms) if full and full is not point else NONE,
    ]


def task_table(scores: Scores) -> Table:
    """A row for each task, a column for each method and number of shots."""
    columns = [(method, shots) for method, of in scores.methods.items() for shots in sorted(of)]
    several = any(len(of) > 1 for of in scores.methods.values())
    rows = []
    for task in scores.tasks:
        found = [scores.methods[method][shots]["tasks"][task] for method, shots in columns]
        rows.append([task, str(found[0].get("n", NONE)), *(percent(r["acc"], r.get("stderr")) for r in found)])
    titles = [
        title_of(method, scores.methods[method][shots]) + (f", {shots} shots" if several else "")
        for method, shots in columns
    ]
    caption = "Accuracy of every task in % ± standard error over its documents."
    return Table(caption, ["task", "documents", *titles], rows)


def comparison_table(report: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """A report.json.

    Raises:
        KeyError: when it has another layout.
    """
    groups = list(report)
    if not all(report.values()):
        raise KeyError("a group has no methods")
    rows = []
    for method in report[groups[0]]:
        found = [report[group][method] for group in groups]
        context, latency = (statistics.fmean(r[key] for r in found) for key in ("context_tokens", "latency_ms"))
        full = [report[group]["icl"]["context_tokens"] for group in groups] if "icl" in report[groups[0]] else []
        shown = full and method != "icl" and prompted(method, found[0])
        short = ratio(statistics.fmean(full), context) if shown else NONE
        cells = [percent(r["accuracy"], r.get("stderr")) for r in found]
        rows.append([title_of(method, found[0]), *cells, number(context), short, number(latency, 2)])
    headings = ["method", *(f"{group} tasks, %" for group in groups)]
    headings += ["edge context, tokens", "compression", "latency, ms"]
    caption = "Accuracy over all queries ± standard error; latency is one answer with its whole context."
    return Table(caption, headings, rows)


def efficiency_table(values: Mapping[str, Any]) -> Table | None:
    """The systems of an efficiency.json; columns that no system has are left out."""
    systems = {**_objects(values.get("methods")), **_objects((values.get("transformers") or {}).get("systems"))}
    columns = {
        "context_tokens": ("edge reads, tokens", 0),
        "kept_tokens": ("kept before, tokens", 0),
        "first_token_ms": ("first token, ms", 2),
        "per_token_ms": ("each later token, ms", 2),
        "answer_ms": ("answer, ms", 2),
        "first_answer_ms": ("first answer with what is done once, ms", 2),
        "latency_ms": ("latency, ms", 2),
    }
    columns = {key: what for key, what in columns.items() if any(key in s for s in systems.values())}
    if not columns:
        return None
    rows = [[title_of(m), *(number(s.get(key), d) for key, (_, d) in columns.items())] for m, s in systems.items()]
    caption = "One answer at a time; medians over the repetitions."
    return Table(caption, ["system", *(text for text, _ in columns.values())], rows)


def agent_tables(values: Mapping[str, Any]) -> list[Table]:
    """The groups of an agent.json: the metrics of GPT4Tools."""
    methods = _objects(values.get("methods"))
    columns = {"sr_t": "SR thought, %", "sr_act": "SR action, %", "sr_args": "SR arguments, %"}
    columns |= {"sr": "SR, %", "iou": "IoU, %", "average": "average, %"}
    tables = []
    for group in dict.fromkeys(group for found in methods.values() for group in _objects(found)):
        rows = []
        for method, found in methods.items():
            if (m := _objects(found).get(group)) is not None:
                cells = [percent(m.get(key), m.get("stderr") if key == "sr" else None) for key in columns]
                cells += [
                    number(m.get("context_tokens")),
                    ratio(m.get("compression"), 1),
                    number(m.get("latency_ms"), 2),
                ]
                title = METHODS[method].title if method in METHODS else method
                rows.append([title, str(m.get("n", NONE)), *cells])
        headings = ["method", "requests", *columns.values(), "edge context, tokens", "compression", "latency, ms"]
        tables.append(Table(f"Tool calls, {group} tools.", headings, rows))
    return tables


def _objects(values: Any) -> dict[str, Any]:
    """The entries that are objects; none of anything else."""
    return {k: v for k, v in values.items() if isinstance(v, dict)} if isinstance(values, dict) else {}


def published_tables() -> list[Table]:
    """What the paper reports, of other models, on another machine."""
    where = f"published, {published.MACHINE}"
    reasoning = [
        [row.model, row.method, row.tasks, number(row.ave), number(row.har), f"{row.latency_ms:g}"]
        for row in published.REASONING
    ]
    agent = [[row.method, "yes" if row.tools_in_prompt else "no", number(row.average)] for row in published.AGENT]
    cost = [
        [row.method, f"{row.inference_macs / 1e9:.1f}", number(row.inference_s, 2), number(row.training_step_s, 2)]
        for row in published.COST
    ]
    return [
        Table(
            f"Reasoning tasks, 5 shots ({where}; Table 2 of the paper).",
            ["edge model", "method", "tasks", "AVE, %", "HAR, %", "latency, ms"],
            reasoning,
        ),
        Table(
            f"GPT4Tools with Gemma-2-2B ({where}; Table 3 of the paper): mean of the five metrics; LoRA-Gen's edge"
            f" context is {published.AGENT_COMPRESSION}× shorter than with the tools.",
            ["method", "tools in the edge's prompt", "average, %"],
            agent,
        ),
        Table(
            f"Cost with Qwen2-1.5B ({where}; Table 13 of the paper).",
            ["method", "inference, G multiply-adds", "inference, s", "training step, s"],
            cost,
        ),
    ]
