"""The paper's tables of accuracy: 2, 3, 4, 5, 6, 7, 8 and 9.

In: results as `tables.results` gathers them, and costs as latency.json holds them (or nothing). Out: a `Sheet` a table,
or None where nothing of it was run. Accuracies are means over seeds with the standard error of that mean; of a single
seed with the one over documents.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_gen_jax.evaluation.means import standard_error
from lora_gen_jax.evaluation.sheet import Cell, Figure, Sheet, number, ratio
from lora_gen_jax.lab.report.style import title_of
from lora_gen_jax.lab.tables.results import error_of
from lora_gen_jax.lab.tables.spec import UNTRAINED_METHODS, is_method_row
from lora_gen_jax.methods.registry import METHODS

Results = Mapping[str, Any]
Costs = Mapping[str, Any]
# With more tasks the table has one column for all seen and one for all unseen tasks.
WIDEST = 10
GROUPS = ("seen", "unseen")
POOLED = "seen and unseen: all queries together; AVE and HAR: mean and harmonic mean over tasks"
ERRORS = "±: over seeds; of a single seed, over documents"


def scores(results: Results, row: str, shots: str | None = None) -> list[dict[str, Any]]:
    """A row's scores by seed, with the most shots unless a number is given."""
    number = results["shots"] if shots is None else shots
    return [by_shots[number] for by_shots in results["runs"].get(row, {}).values() if number in by_shots]


def group(results: Results, row: str, title: str, shots: str | None = None) -> Figure | None:
    """Pooled accuracy on the seen or the unseen tasks, in percent."""
    groups = [one["groups"].get(title, {}) for one in scores(results, row, shots)]
    return share((one.get("accuracy") for one in groups), (one.get("stderr") for one in groups))


def on_task(results: Results, row: str, task: str) -> Figure | None:
    """Accuracy on one task, in percent."""
    found = [one["tasks"][task] for one in scores(results, row)]
    return share((one["acc"] for one in found), (one.get("stderr") for one in found))


def mean(results: Results, row: str, name: str, shots: str | None = None) -> Figure | None:
    """ "ave" or "har", or these with "_seen" or "_unseen" behind, in percent."""
    found = scores(results, row, shots)
    return share((one[name] for one in found), (error_of(results, one, name) for one in found))


def context(results: Results, row: str, shots: str | None = None, title: str | None = None) -> Figure | None:
    """Tokens in the edge model's context for a query, soft ones too: the mean over tasks, or those of one group."""
    means = []
    for one in scores(results, row, shots):
        tasks = [r["context_tokens"] for t, r in one["tasks"].items() if title in (None, group_of(results, t))]
        means.append(sum(tasks) / len(tasks) if tasks else None)
    return plain(over_seeds(means))


def group_of(results: Results, task: str) -> str:
    return GROUPS[0] if results["seen"][task] else GROUPS[1]


def over_seeds(values: Iterable[float | None], scale: float = 1.0, digits: int = 1, unit: str = "") -> Figure | None:
    """Mean and standard error of the values that are known; None where there are none."""
    known = [scale * value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return None
    error = standard_error(known) if len(known) > 1 else None
    return Figure(statistics.fmean(known), error, len(known), digits, unit)


def share(values: Iterable[float | None], errors: Iterable[float | None] = ()) -> Figure | None:
    """Shares in percent; a single one with its own standard error, over documents."""
    found, single = over_seeds(values, 100), next(iter(errors), None)
    if found is None or found.n > 1 or single is None:
        return found
    return dataclasses.replace(found, error=100 * single)


def plain(figure: Figure | None, digits: int = 1, unit: str = "") -> Figure | None:
    """A figure without its error."""
    return None if figure is None else Figure(figure.mean, None, figure.n, digits, unit)


def answer(costs: Costs, row: str, key: str = "answer_ms") -> Any:
    """A measured cost of a row's answer; None where there is none."""
    return costs.get("answers", {}).get(row, {}).get(key)


def latency(costs: Costs, row: str) -> tuple[Cell, Cell]:
    """Milliseconds of an answer, and their ratio to LoRA's."""
    own, lora = answer(costs, row), answer(costs, "lora")
    return number(own, 2), ratio(own, lora, 2)


def there(results: Results, rows: Sequence[str]) -> list[str]:
    """The rows that were asked for; those that have no result yet are shown without figures."""
    asked = set(results["settings"]) | ({"icl"} if "base" in results["settings"] else set())
    return [row for row in rows if row in asked]


def method_rows(results: Results) -> list[str]:
    """The rows of the tables that compare methods: what needs no training, then the runs in the file's order."""
    runs = [run for run, one in results["settings"].items() if is_method_row(run, one["method"])]
    return [*there(results, UNTRAINED_METHODS), *runs]


def over(results: Results, rows: Sequence[str], cells: Callable[[str], Sequence[Cell]]) -> tuple[tuple[Cell, ...], ...]:
    """Lines of a table, each with its method's title."""
    return tuple((name_of(results, row), *cells(row)) for row in rows)


def name_of(results: Results, row: str) -> str:
    """A row in words: its method, and what tells it from another row of that method."""
    settings = results["settings"]
    if row in UNTRAINED_METHODS or row not in settings:
        return title_of(row)
    own, alike = in_words(settings[row]), [in_words(settings[run]) for run in method_rows(results) if run in settings]
    return f"{own} ({row})" if alike.count(own) > 1 and row != settings[row]["method"] else own


def in_words(settings: Mapping[str, Any]) -> str:
    """A run's method, and that the edge model does not read the prompt where it might."""
    method = METHODS[settings["method"]]
    return method.title + (", no prompt" * (method.may_read_prompt and not settings["data"]["edge_reads_prompt"]))


def table_2(results: Results, costs: Costs) -> Sheet | None:
    """Methods by tasks: a column a task where there are few, else the means of seen and of unseen ones."""
    rows, tasks = method_rows(results), sorted(results["seen"], key=lambda task: not results["seen"][task])
    if not rows:
        return None
    wide = len(tasks) <= WIDEST

    def cells(row: str) -> list[Cell]:
        found: list[Cell] = []
        if wide:
            found += [on_task(results, row, task) for task in tasks]
        found += [group(results, row, title) for title in GROUPS]
        found += [mean(results, row, name) for name in ("ave_seen", "ave_unseen", "har_unseen", "ave", "har")]
        return [*found, context(results, row), *latency(costs, row)]

    each = tuple(f"{task}\n{group_of(results, task)}" for task in tasks) if wide else ()
    counts = [sum(group_of(results, task) == title for task in tasks) for title in GROUPS]
    averages = tuple(f"AVE {title}\nof {count}" for title, count in zip(GROUPS, counts, strict=True))
    averages += (f"HAR unseen\nof {counts[1]}",)
    columns = ("method", *each, *GROUPS, *averages, "AVE", "HAR", "context\ntokens", "latency\nms", "of LoRA's")
    title = f"accuracy in % ± standard error, {results['shots']} shots"
    return Sheet(title, columns, over(results, rows, cells), (POOLED, ERRORS), 2)


def table_3(results: Results) -> Sheet | None:
    """Tool calls."""
    from lora_gen_jax.lab.agent.table import AGENT_ROWS, METRICS

    if "agent" not in results["settings"]:
        return None
    seeds = list(results["agent"].values())
    found = [name for name in AGENT_ROWS if any(name in one for one in seeds)] or list(AGENT_ROWS)
    rows: list[tuple[Cell, ...]] = []
    for title in GROUPS:
        for name in found:
            own = [one[name][title] for one in seeds if title in one.get(name, {})]
            shares = [share(one[metric] for one in own) for metric in METRICS]
            tokens = plain(over_seeds(one["context_tokens"] for one in own))
            ratio = plain(over_seeds(one["compression"] for one in own), unit="×")
            rows.append((AGENT_ROWS[name].title, title, *shares, tokens, ratio))
    columns = ("method", "tools", *METRICS.values(), "edge\ntokens", "com-\npression")
    return Sheet("tool calls, % ± standard error", columns, rows, number=3)


def table_4(results: Results, costs: Costs) -> Sheet | None:
    """AutoCompressors against LoRA-Gen, on unseen tasks."""
    rows = there(results, ("icl", "autocompressor", "lora_gen"))
    if "autocompressor" not in rows:
        return None

    def cells(row: str) -> list[Cell]:
        accuracies = (group(results, row, "unseen"), mean(results, row, "ave_unseen"))
        return [*accuracies, context(results, row, title="unseen"), *latency(costs, row)]

    columns = ("method", "unseen", "AVE unseen", "context\ntokens", "latency\nms", "of LoRA's")
    return Sheet(
        "context compression on unseen tasks, % ± standard error", columns, over(results, rows, cells), number=4
    )


def ablation(
    results: Results, which: tuple[int, str, str], rows: Sequence[tuple[str, str]], extra: Sequence[str] = ()
) -> Sheet | None:
    """A table of variants of LoRA-Gen.

    Args:
        results: gathered.
        which: the paper's number, the title, and the title of the first column.
        rows: title and run of each line.
        extra: facts of a run that have a column, by name.
    """
    if len(rows) < 2:
        return None
    lines: list[tuple[Cell, ...]] = []
    for title, run in rows:
        facts = list(results["facts"].get(run, {}).values())
        known = [plain(over_seeds(one.get(name) for one in facts), digits=0) for name in extra]
        accuracies = [group(results, run, name) for name in GROUPS]
        averages = [mean(results, run, name) for name in ("ave_seen", "ave_unseen", "ave", "har")]
        lines.append((title, *accuracies, *averages, *known))
    titles = (name.replace("_", " ") for name in extra)
    columns = (which[2], *GROUPS, "AVE seen", "AVE unseen", "AVE", "HAR", *titles)
    return Sheet(f"{which[1]}, % ± standard error", columns, lines, number=which[0])


def varied(results: Results, prefix: str, field: str) -> list[tuple[str, str]]:
    """(value, run) of the runs whose names start so, and of the default, in the order of the value."""
    runs = [run for run in results["settings"] if run == "lora_gen" or run.startswith(prefix)]
    values = {run: results["settings"][run]["generator"][field] for run in runs}
    return [(f"{values[run]:g}", run) for run in sorted(runs, key=lambda run: (values[run], run))]


def table_5(results: Results) -> Sheet | None:
    """The number of experts."""
    return ablation(results, (5, "number of experts", "experts"), varied(results, "experts_", "num_experts"))


def table_6(results: Results) -> Sheet | None:
    """The weight of the balance loss."""
    return ablation(results, (6, "weight of the loss CV²", "α_cv"), varied(results, "cv_", "cv_coefficient"))


def table_7(results: Results) -> Sheet | None:
    """How the router chooses."""
    names = {
        "lora_gen": "KeepTOP-K",
        "gumbel_top_k": "Gumbel-softmax, then KeepTOP-K (the paper's ablation)",
        "gumbel": "Gumbel-softmax of all experts (ours)",
    }
    rows = [(title, run) for run, title in names.items() if run in results["settings"]]
    return ablation(results, (7, "routing", "routing"), rows)


def table_9(results: Results) -> Sheet | None:
    """What the cloud model emits."""
    names = {"direct": "direct generation of the LoRA", "lora_gen": "meta tokens and a pool of experts"}
    rows = [(title, run) for run, title in names.items() if run in results["settings"]]
    return ablation(results, (9, "what the cloud model emits", "generation"), rows, ("trained_parameters",))


def table_8(results: Results, costs: Costs) -> Sheet | None:
    """In-context learning and LoRA-Gen by number of shots."""
    rows = there(results, ("icl", "lora_gen"))
    numbers = {n for row in rows for by_shots in results["runs"].get(row, {}).values() for n in by_shots}
    lines: list[tuple[Cell, ...]] = []
    for row in rows:
        for shots in sorted(numbers, key=int):
            timed = "icl" if row == "icl" and shots == results["shots"] else f"{row}_{shots}" if row == "icl" else row
            accuracies = [group(results, row, title, shots) for title in GROUPS]
            averages = [mean(results, row, name, shots) for name in ("ave", "har")]
            read = context(results, row, shots)
            lines.append((name_of(results, row), shots, *accuracies, *averages, read, latency(costs, timed)[0]))
    columns = ("method", "shots", *GROUPS, "AVE", "HAR", "context\ntokens", "latency\nms")
    return Sheet("number of shots, % ± standard error", columns, lines, number=8) if lines else None
