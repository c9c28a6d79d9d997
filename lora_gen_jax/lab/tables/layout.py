"""The paper's tables: 1 to 9 and 13, and the foot below them.

In: results as `tables.output.gather` gives them, and costs as latency.json holds them (or nothing). Out: a `Sheet` a
table, or None where nothing of it was run. Accuracies are means over seeds with the standard error of that mean; those
of a single seed have the one over documents.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_gen_jax.evaluation import published
from lora_gen_jax.evaluation.means import error_of, standard_error
from lora_gen_jax.evaluation.sheet import Cell, Figure, Sheet, number, ratio, si
from lora_gen_jax.lab.agent.table import AGENT_ROWS, METRICS
from lora_gen_jax.lab.costs.methods import KEPT_PREFIX
from lora_gen_jax.lab.costs.training import GROUPED
from lora_gen_jax.lab.report.style import title_of
from lora_gen_jax.lab.tables.spec import AGENT, GENERATOR, UNTRAINED, UNTRAINED_METHODS, compresses, is_method_row
from lora_gen_jax.methods.method import Traits
from lora_gen_jax.methods.registry import BASELINE, FULL_PROMPT, METHODS

Results = Mapping[str, Any]
Costs = Mapping[str, Any]
# With more tasks the table has one column for all seen and one for all unseen tasks.
WIDEST = 10
GROUPS = ("seen", "unseen")
AVERAGES = ("ave_seen", "ave_unseen", "ave", "har")
NOTES = (
    "seen and unseen: all queries together; AVE and HAR: mean and harmonic mean over tasks",
    "±: over seeds; of a single seed, over documents",
)


def over_seeds(values: Iterable[float | None], scale: float = 1.0, digits: int = 1, unit: str = "") -> Figure | None:
    """Mean and standard error of the values that are known; None where there are none."""
    known = [scale * value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return None
    error = standard_error(known) if len(known) > 1 else None
    return Figure(statistics.fmean(known), error, len(known), digits, unit)


def plain(values: Iterable[float | None], digits: int = 1, unit: str = "") -> Figure | None:
    """A mean over seeds without an error."""
    figure = over_seeds(values, digits=digits, unit=unit)
    return None if figure is None else dataclasses.replace(figure, error=None)


def share(pairs: Iterable[tuple[float | None, float | None]]) -> Figure | None:
    """A share in percent from (share, standard error) by seed; that of a single seed keeps its own error."""
    pairs = list(pairs)
    found = over_seeds((value for value, _ in pairs), 100)
    if found is None or found.n > 1 or (error := pairs[0][1]) is None:
        return found
    return dataclasses.replace(found, error=100 * error)


def scores(results: Results, row: str, shots: str | None = None) -> list[dict[str, Any]]:
    """A row's scores by seed, with the most shots unless a number is given."""
    wanted = results["shots"] if shots is None else shots
    return [by_shots[wanted] for by_shots in results["runs"].get(row, {}).values() if wanted in by_shots]


def group(results: Results, row: str, title: str, shots: str | None = None) -> Figure | None:
    """Accuracy on all queries of the seen or the unseen tasks, in percent."""
    groups = [one["groups"].get(title, {}) for one in scores(results, row, shots)]
    return share((one.get("accuracy"), one.get("stderr")) for one in groups)


def on_task(results: Results, row: str, task: str) -> Figure | None:
    """Accuracy on one task, in percent."""
    found = [one["tasks"][task] for one in scores(results, row)]
    return share((one["acc"], one.get("stderr")) for one in found)


def mean(results: Results, row: str, name: str, shots: str | None = None) -> Figure | None:
    """ "ave" or "har", or these followed by "_seen" or "_unseen", in percent."""
    return share((one[name], error_of(one, results["seen"], name)) for one in scores(results, row, shots))


def context(results: Results, row: str, shots: str | None = None, title: str | None = None) -> Figure | None:
    """Tokens in the edge model's context for a query, soft ones too: the mean over tasks, or those of one group."""
    means = []
    for one in scores(results, row, shots):
        tasks = [r["context_tokens"] for t, r in one["tasks"].items() if title in (None, group_of(results, t))]
        means.append(sum(tasks) / len(tasks) if tasks else None)
    return plain(means)


def group_of(results: Results, task: str) -> str:
    return GROUPS[0] if results["seen"][task] else GROUPS[1]


def answer(costs: Costs, row: str, key: str = "answer_ms") -> Any:
    """A measured cost of a row's answer; None where there is none."""
    return costs.get("answers", {}).get(row, {}).get(key)


def latency(costs: Costs, row: str) -> tuple[Cell, Cell]:
    """Milliseconds of an answer, and their ratio to LoRA's."""
    own = answer(costs, row)
    return number(own, 2), ratio(own, answer(costs, BASELINE.key), 2)


def rows_with_results(results: Results, rows: Sequence[str]) -> list[str]:
    """The rows that were asked for; those without a result yet are shown without figures."""
    asked = set(results["settings"]) | ({FULL_PROMPT.key} if UNTRAINED in results["settings"] else set())
    return [row for row in rows if row in asked]


def method_rows(results: Results) -> list[str]:
    """The rows of the tables that compare methods: what needs no training, then the runs in the file's order."""
    runs = [run for run, one in results["settings"].items() if is_method_row(run, one["method"])]
    return [*rows_with_results(results, UNTRAINED_METHODS), *runs]


def table_rows(results: Results, rows: Sequence[str], cells: Callable[[str], Sequence[Cell]]) -> list[Sequence[Cell]]:
    """Lines of a table, each with its method's title."""
    return [(name_of(results, row), *cells(row)) for row in rows]


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
    each = tasks if len(tasks) <= WIDEST else []

    def cells(row: str) -> list[Cell]:
        found = [on_task(results, row, task) for task in each] + [group(results, row, title) for title in GROUPS]
        found += [mean(results, row, name) for name in ("ave_seen", "ave_unseen", "har_unseen", "ave", "har")]
        return [*found, context(results, row), *latency(costs, row)]

    counts = [sum(group_of(results, task) == title for task in tasks) for title in GROUPS]
    columns = ("method", *(f"{task}\n{group_of(results, task)}" for task in each), *GROUPS)
    columns += (f"AVE seen\nof {counts[0]}", f"AVE unseen\nof {counts[1]}", f"HAR unseen\nof {counts[1]}")
    columns += ("AVE", "HAR", "context\ntokens", "latency\nms", "of LoRA's")
    title = f"accuracy in % ± standard error, {results['shots']} shots"
    return Sheet(title, columns, table_rows(results, rows, cells), NOTES, 2)


def table_3(results: Results) -> Sheet | None:
    """Tool calls."""
    if AGENT not in results["settings"]:
        return None
    seeds = list(results["agent"].values())
    found = [name for name in AGENT_ROWS if any(name in one for one in seeds)] or list(AGENT_ROWS)
    rows: list[Sequence[Cell]] = []
    for title in GROUPS:
        for name in found:
            own = [one[name][title] for one in seeds if title in one.get(name, {})]
            shares = [over_seeds((one[metric] for one in own), 100) for metric in METRICS]
            tokens = plain(one["context_tokens"] for one in own)
            fewer = plain((one["compression"] for one in own), unit="×")
            rows.append((AGENT_ROWS[name].title, title, *shares, tokens, fewer))
    columns = ("method", "tools", *METRICS.values(), "edge\ntokens", "com-\npression")
    return Sheet("tool calls, % ± standard error", columns, rows, number=3)


def table_4(results: Results, costs: Costs) -> Sheet | None:
    """Other methods that compress the context against LoRA-Gen, on unseen tasks."""
    runs = {run: one["method"] for run, one in results["settings"].items() if is_method_row(run, one["method"])}
    others = [run for run, key in runs.items() if key != GENERATOR and compresses(METHODS[key])]
    if not others:
        return None
    rows = rows_with_results(results, (FULL_PROMPT.key, *others, GENERATOR))

    def cells(row: str) -> list[Cell]:
        accuracies = (group(results, row, "unseen"), mean(results, row, "ave_unseen"))
        return [*accuracies, context(results, row, title="unseen"), *latency(costs, row)]

    columns = ("method", "unseen", "AVE unseen", "context\ntokens", "latency\nms", "of LoRA's")
    title = "context compression on unseen tasks, % ± standard error"
    return Sheet(title, columns, table_rows(results, rows, cells), number=4)


def ablation(
    results: Results, table: int, titles: tuple[str, str], rows: Mapping[str, str], sizes: bool = False
) -> Sheet | None:
    """A table of variants of LoRA-Gen.

    Args:
        results: gathered.
        table: the paper's number.
        titles: of the table and of its first column.
        rows: title by run.
        sizes: with a column for the number of trained parameters.
    """
    if len(rows) < 2:
        return None
    lines: list[Sequence[Cell]] = []
    for run, title in rows.items():
        cells = [group(results, run, name) for name in GROUPS] + [mean(results, run, name) for name in AVERAGES]
        trained = [one.get("trained_parameters") for one in results["facts"].get(run, {}).values()]
        lines.append((title, *cells, *([plain(trained, digits=0)] if sizes else [])))
    columns = (titles[1], *GROUPS, "AVE seen", "AVE unseen", "AVE", "HAR", *(["trained parameters"] * sizes))
    return Sheet(f"{titles[0]}, % ± standard error", columns, lines, number=table)


def varied(results: Results, prefix: str, field: str) -> dict[str, str]:
    """The values of the runs whose names start so, and of the default, in ascending order."""
    runs = [run for run in results["settings"] if run == GENERATOR or run.startswith(prefix)]
    values = {run: results["settings"][run]["generator"][field] for run in runs}
    return {run: f"{values[run]:g}" for run in sorted(runs, key=lambda run: (values[run], run))}


def ablations(results: Results) -> list[Sheet | None]:
    """Tables 5, 6, 7 and 9: the number of experts, the balance loss, the routing, and what the cloud model emits."""
    routing = {
        GENERATOR: "KeepTOP-K",
        "gumbel_top_k": "Gumbel-softmax, then KeepTOP-K (the paper's ablation)",
        "gumbel": "Gumbel-softmax of all experts (ours)",
    }
    emitted = {"direct": "direct generation of the LoRA", GENERATOR: "meta tokens and a pool of experts"}
    known = [{run: t for run, t in names.items() if run in results["settings"]} for names in (routing, emitted)]
    return [
        ablation(results, 5, ("number of experts", "experts"), varied(results, "experts_", "num_experts")),
        ablation(results, 6, ("weight of the loss CV²", "α_cv"), varied(results, "cv_", "cv_coefficient")),
        ablation(results, 7, ("routing", "routing"), known[0]),
        ablation(results, 9, ("what the cloud model emits", "generation"), known[1], sizes=True),
    ]


def table_8(results: Results, costs: Costs) -> Sheet | None:
    """In-context learning and LoRA-Gen by number of shots."""
    rows = rows_with_results(results, (FULL_PROMPT.key, GENERATOR))
    counts = {n for row in rows for by_shots in results["runs"].get(row, {}).values() for n in by_shots}
    lines: list[Sequence[Cell]] = []
    for row in rows:
        for shots in sorted(counts, key=int):
            timed = f"{row}_{shots}" if row == FULL_PROMPT.key and shots != results["shots"] else row
            accuracies = [group(results, row, title, shots) for title in GROUPS]
            averages = [mean(results, row, name, shots) for name in ("ave", "har")]
            read = context(results, row, shots)
            lines.append((name_of(results, row), shots, *accuracies, *averages, read, latency(costs, timed)[0]))
    columns = ("method", "shots", *GROUPS, "AVE", "HAR", "context\ntokens", "latency\nms")
    return Sheet("number of shots, % ± standard error", columns, lines, number=8) if lines else None


PUBLISHED = {2: published.table_2, 3: published.table_3, 4: published.table_4, 13: published.table_13}
# The case of `lab.costs.training` that a row shows.
STEPS = {BASELINE.key: BASELINE.key, GENERATOR: GROUPED}


def table_1(results: Results, costs: Costs, traits: Mapping[str, Traits]) -> Sheet | None:
    """What a method can do, with what was measured about it."""
    # The untrained rows are methods themselves.
    of = {row: results["settings"].get(row, {}).get("method", row) for row in method_rows(results)}
    rows = [row for row in of if row != UNTRAINED and of[row] in traits]
    if not rows:
        return None
    full = context(results, FULL_PROMPT.key)

    def cells(row: str) -> list[Cell]:
        own, read, once = traits[of[row]], context(results, row), answer(costs, row, "once_ms")
        yes = [own.compresses_context, own.merged, own.training_free, own.transfers]
        # Others read as little, but then know nothing of the prompt.
        shorter = full if own.compresses_context or row == FULL_PROMPT.key else None
        fewer = ratio(shorter and shorter.mean, read and read.mean)
        extra = answer(costs, row, "numbers_beside")
        seconds = None if once is None else number(sum(once.values()) / 1000, 3)
        return [*("yes" if one else "no" for one in yes), fewer, number(extra, 0), seconds]

    words = ("compresses\ncontext", "merged: no extra\nparameters", "training-free for\na new task")
    measured = ("ICL's context\nover its own", "numbers beside\nthe weights", "seconds to\nspecialize")
    columns = ("method", *words, "passes knowledge\nbetween models", *measured)
    notes = (
        "the last three columns are measured; the others follow from how a method works",
        "numbers beside the weights: an adapter's parameters, and keys and values of soft tokens",
    )
    return Sheet("characteristics", columns, table_rows(results, rows, cells), notes, 1)


def table_13(results: Results, costs: Costs) -> Sheet | None:
    """What an answer and a training step cost."""
    if "answers" not in costs:
        return None
    rows = [row for row in (*method_rows(results), KEPT_PREFIX) if row in costs["answers"]]
    training = costs.get("training", {})

    def cells(row: str) -> list[Cell]:
        macs, once = answer(costs, row, "macs"), answer(costs, row, "once_ms")
        step = training.get(STEPS.get(row, ""), {})
        before = sum(once.values()) if once else None
        trained: list[Cell] = [number(step.get("step_ms")), si(step["macs"]) if step else None]
        return [si(macs["answer"]), *latency(costs, row), number(before), *trained]

    columns = ("method", "inference\nMACs", "answer\nms", "of LoRA's", "once a task\nms", "training step\nms", "MACs")
    work = costs["workload"]
    lines = [
        f"an answer of {work['new_tokens']} tokens to {work['input_tokens']}, instruction {work['instruction_tokens']}"
        " tokens; medians, all methods taking turns with nothing else running"
    ]
    if alone := training.get(GENERATOR):
        lines.append(
            "a training step takes 8 queries of one instruction, which LoRA-Gen reads once; reading it for every query,"
            f" as published, takes {alone['step_ms']:.1f} ms"
        )
    return Sheet("cost", columns, table_rows(results, rows, cells), lines, 13)


def all_tables(results: Results, costs: Costs, traits: Mapping[str, Traits]) -> list[Sheet]:
    """The paper's Tables 1 to 9 and 13, as far as they were asked for, four with the published figures below."""
    sheets = [
        table_1(results, costs, traits),
        table_2(results, costs),
        table_3(results),
        table_4(results, costs),
        *ablations(results),
        table_8(results, costs),
        table_13(results, costs),
    ]
    made = sorted((sheet for sheet in sheets if sheet is not None), key=lambda sheet: sheet.number or 0)
    return [dataclasses.replace(s, published=PUBLISHED[s.number]()) if s.number in PUBLISHED else s for s in made]


def foot(results: Results, costs: Costs) -> list[str]:
    """Seeds, documents, steps, machines and versions: a line each; what ran elsewhere is named."""
    steps: dict[int, list[str]] = {}
    for run, seeds in results["facts"].items():
        for one in seeds.values():
            if one.get("steps") and run not in steps.setdefault(one["steps"], []):
                steps[one["steps"]].append(run)
    seeds = results["seeds"]
    over = f"over {len(seeds)} seeds: {', '.join(seeds)}" if len(seeds) > 1 else f"over documents, seed {seeds[0]}"
    lines = [f"mean ± standard error {over}"]
    limits = [(results["settings"][run]["eval"]["limit"], [run]) for run in results["facts"]]
    lines += places([(f"the first {limit} documents of a task" if limit else "", runs) for limit, runs in limits])
    lines += [f"{count} steps: {', '.join(runs)}" for count, runs in sorted(steps.items())]
    machines = [(place["machine"], place["runs"]) for place in results["machines"]]
    versions = [(place["versions"], place["runs"]) for place in results["versions"]]
    if "machine" in costs:
        machines.append((costs["machine"], ["costs"]))
        versions.append((costs["versions"], ["costs"]))
    lines += places([(f"{one['device']}, {one['cpus']} CPUs, {one['system']}", runs) for one, runs in machines])
    return lines + places([(", ".join(f"{n} {v}" for n, v in one.items()), runs) for one, runs in versions])


def places(found: Iterable[tuple[str, list[str]]]) -> list[str]:
    """Lines about where or with what runs were made, once each; where they differ, with the runs behind them."""
    lines: dict[str, list[str]] = {}
    for text, runs in found:
        if text:
            lines[text] = list(dict.fromkeys((*lines.get(text, []), *runs)))
    return [text if len(lines) == 1 else f"{text}: {', '.join(runs)}" for text, runs in lines.items()]
