"""The paper's tables of characteristics and of cost, 1 and 13, the published figures beside ours, and the foot.

In: as `tables.layout`. Out: `Sheet`s, and the list of all tables.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from lora_gen_jax.evaluation import published
from lora_gen_jax.evaluation.sheet import Cell, Sheet, number, ratio, si
from lora_gen_jax.lab.costs.methods import KEPT_PREFIX
from lora_gen_jax.lab.costs.training import GROUPED
from lora_gen_jax.lab.tables import layout
from lora_gen_jax.lab.tables.layout import Costs, Results, answer, context
from lora_gen_jax.lab.tables.spec import UNTRAINED
from lora_gen_jax.methods.method import Traits
from lora_gen_jax.methods.registry import BASELINE, FULL_PROMPT, GENERATOR

PUBLISHED = {2: published.table_2, 3: published.table_3, 4: published.table_4, 13: published.table_13}
# The case of `lab.costs.training` that a row shows.
STEPS = {BASELINE.key: BASELINE.key, GENERATOR.key: GROUPED}


def table_1(results: Results, costs: Costs, traits: Mapping[str, Traits]) -> Sheet | None:
    """What a method can do, with what was measured about it."""
    # The untrained rows are methods themselves.
    of = {row: results["settings"].get(row, {}).get("method", row) for row in layout.method_rows(results)}
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
    return Sheet("characteristics", columns, layout.table_rows(results, rows, cells), notes, 1)


def table_13(results: Results, costs: Costs) -> Sheet | None:
    """What an answer and a training step cost."""
    if "answers" not in costs:
        return None
    rows = [row for row in (*layout.method_rows(results), KEPT_PREFIX) if row in costs["answers"]]
    training = costs.get("training", {})

    def cells(row: str) -> list[Cell]:
        macs, once = answer(costs, row, "macs"), answer(costs, row, "once_ms")
        step = training.get(STEPS.get(row, ""), {})
        before = sum(once.values()) if once else None
        trained: list[Cell] = [number(step.get("step_ms")), si(step["macs"]) if step else None]
        return [si(macs["answer"]), *layout.latency(costs, row), number(before), *trained]

    columns = ("method", "inference\nMACs", "answer\nms", "of LoRA's", "once a task\nms", "training step\nms", "MACs")
    work = costs["workload"]
    lines = [
        f"an answer of {work['new_tokens']} tokens to {work['input_tokens']}, instruction {work['instruction_tokens']}"
        " tokens; medians, all methods taking turns with nothing else running"
    ]
    if alone := training.get(GENERATOR.key):
        lines.append(
            "a training step takes 8 queries of one instruction, which LoRA-Gen reads once; reading it for every query,"
            f" as published, takes {alone['step_ms']:.1f} ms"
        )
    return Sheet("cost", columns, layout.table_rows(results, rows, cells), lines, 13)


def all_tables(results: Results, costs: Costs, traits: Mapping[str, Traits]) -> list[Sheet]:
    """The paper's Tables 1 to 9 and 13, as far as they were asked for, four with the published figures below."""
    sheets = [
        table_1(results, costs, traits),
        layout.table_2(results, costs),
        layout.table_3(results),
        layout.table_4(results, costs),
        *layout.ablations(results),
        layout.table_8(results, costs),
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
