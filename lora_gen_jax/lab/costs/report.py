"""What the measured costs mean: ratios, break-even points and tables.

In: the dictionary that efficiency.json holds. Out: the derived part of it, and tables of at most 120 columns on
standard output.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lora_gen_jax.evaluation.published import COST
from lora_gen_jax.evaluation.sheet import MISSING, Sheet, si, to_screen
from lora_gen_jax.lab.costs.methods import KEPT_PREFIX
from lora_gen_jax.methods.registry import BASE, FULL_PROMPT, GENERATOR, METHODS

# Qwen2-1.5B on an A100, 100 input and 200 instruction tokens, training at batch 8: the paper's Table 13.
PUBLISHED = {
    "model": "Qwen2-1.5B",
    **{
        key: {"macs": row.inference_macs, "latency_s": row.inference_s, "step_s": row.training_step_s}
        for key, method in METHODS.items()
        for row in COST
        if row.method == method.title
    },
}
OWN, FULL = GENERATOR.key, FULL_PROMPT.key
# Each with what it says: the first system's time over the second's.
RATIOS = {
    (OWN, FULL): "specialized / full prompt",
    (OWN, KEPT_PREFIX): "specialized / kept prefix",
    (OWN, "transformers_full_prompt"): "specialized / transformers, full prompt",
    (OWN, "transformers_kept_prefix"): "specialized / transformers, kept prefix",
    (BASE.key, "transformers_no_prompt"): "same work: base, no prompt",
    (FULL, "transformers_full_prompt"): "same work: full prompt",
    (KEPT_PREFIX, "transformers_kept_prefix"): "same work: kept prefix",
}
# Pairs that read the same ids with the same weights must write the same.
SAME_ANSWER = [pair for pair in RATIOS if pair[0] != OWN]
RATIO_COLUMNS = ("first_token", "per_token", "answer", "first_answer")
CURVE_QUERIES = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def break_even(own: tuple[float, float], other: tuple[float, float]) -> dict[str, Any]:
    """How many queries it takes until a method with a cost of its own beforehand costs no more than another.

    Args:
        own, other: (once a task, each query), in the same unit.

    Returns:
        ``{"queries": n}`` with the smallest n ≥ 1 for which once + n·each of `own` is at most that of `other`, None
        where there is none; and a "reason" where n is None or where it stops paying again ("until" queries).
    """
    (once, each), (other_once, other_each) = own, other
    more, saved = once - other_once, other_each - each
    if more + each - other_each <= 0:
        if saved >= 0:
            return {"queries": 1}
        until = math.floor(more / saved + 1e-9)
        return {"queries": 1, "until": until, "reason": f"a query takes {-saved:.3g} ms longer"}
    if saved <= 0:
        reason = f"a query takes {-saved:.3g} ms longer" if saved else "a query takes as long"
        return {"queries": None, "reason": f"{reason}, and the task {more:.3g} ms more beforehand"}
    # In floating point the quotient of two equal costs may come out beside the integer.
    return {"queries": max(1, math.ceil(more / saved - 1e-9))}


def derived(results: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios, break-even points and curves from the methods' figures."""
    systems = {**results["methods"], **results["transformers"].get("systems", {})}
    costs = {name: (sum(s["once_ms"].values()), s["answer_ms"]) for name, s in systems.items()}
    pairs = [pair for pair in RATIOS if pair[0] in systems and pair[1] in systems]
    return {
        "ratios": [
            {"of": a, "to": b, **{k: round(systems[a][f"{k}_ms"] / systems[b][f"{k}_ms"], 4) for k in RATIO_COLUMNS}}
            for a, b in pairs
        ],
        "break_even": {b: break_even(costs[OWN], costs[b]) for a, b in pairs if a == OWN},
        "curve": {
            "queries": list(CURVE_QUERIES),
            "ms": {name: [round(o + n * each, 3) for n in CURVE_QUERIES] for name, (o, each) in costs.items()},
        },
        "same_answer": {
            f"{a} = {b}": [
                sum(x == y for x, y in zip(systems[a]["ids"], systems[b]["ids"], strict=True)),
                len(systems[b]["ids"]),
            ]
            for a, b in pairs
            if (a, b) in SAME_ANSWER
        },
    }


def disagreements(results: Mapping[str, Any]) -> list[str]:
    """Programs whose multiply-adds by formula and by the compiler differ by more than the tolerance."""
    found = []
    for name, method in results["methods"].items():
        for part in ("executed_prefill", "executed_token"):
            if not method["macs"][part]["agrees"]:
                found.append(f"{name} {part}: {method['macs'][part]['difference']:+.1%}")
    for name, part in results["specializing"].items():
        if not part["macs"]["agrees"]:
            found.append(f"specializing, {name}: {part['macs']['difference']:+.1%}")
    return found


def digits(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def spread(value: float, limits: Sequence[float]) -> str:
    """A median and the range around it."""
    return f"{digits(value)} ({digits(limits[0])}–{digits(limits[1])})"


def speed_sheet(results: Mapping[str, Any]) -> Sheet:
    """Context, latency, memory and throughput, one line a system."""
    batches, rows = [str(n) for n in results["setting"]["batch_sizes"]], []
    for name, s in {**results["methods"], **results["transformers"].get("systems", {})}.items():
        kept = f" + {s['kept_tokens']} kept" if s["kept_tokens"] else ""
        times = [digits(s["first_token_ms"]), digits(s["per_token_ms"]), spread(s["answer_ms"], s["answer_ms_range"])]
        once = sum(s["once_ms"].values())
        times += [digits(once) if once else MISSING, digits(s["first_answer_ms"]), si(s["peak_bytes"])]
        rows.append([name, f"{s['context_tokens']}{kept}", *times, *(digits(s["tokens_per_s"][n]) for n in batches)])
    columns = ["method", "edge reads", "first\ntoken", "each\nlater", "answer (range)", "once a\ntask", "first\nanswer"]
    title = f"Milliseconds for an answer of {results['setting']['new_tokens']} tokens, medians; tokens/s by batch size"
    return Sheet(title, [*columns, "peak\nB", *(f"tok/s\nB={n}" for n in batches)], rows)


def macs_sheet(results: Mapping[str, Any]) -> Sheet:
    """Multiply-adds by formula and by the compiler."""

    def cells(macs: Mapping[str, Any]) -> list[str]:
        extra = macs["elementwise_share"]
        share = MISSING if extra is None else f"{100 * extra:+.1f}"
        return [si(macs["formula"]), si(macs["compiler"]), f"{100 * macs['difference']:+.2f}", share]

    rows = []
    for name, macs in ((name, method["macs"]) for name, method in results["methods"].items()):
        needed = [si(macs["prefill"]), si(macs["answer"])]
        rows.append([name, *needed, *cells(macs["executed_prefill"]), *cells(macs["executed_token"])])
    for name, part in results["specializing"].items():
        rows.append([f"  specializing: {name}", "", "", *cells(part["macs"]), *[""] * 4])
    one = ["formula", "compiler", "%", "all %"]
    columns = ["method", "reading", "answer", *(f"prefill\n{c}" for c in one), *(f"token\n{c}" for c in one)]
    return Sheet("Multiply-adds; 'reading' and 'answer' unpadded, the rest as executed", columns, rows)


def training_sheet(results: Mapping[str, Any]) -> Sheet:
    """Training step time and memory."""
    rows = []
    for name, t in results["training"].items():
        sizes = [f"{t['prompts']} × {t['queries'] // t['prompts']}", str(t["cloud_tokens"]), str(t["edge_tokens"])]
        rows.append([name, *sizes, si(t["macs"]), spread(t["step_ms"], t["step_ms_range"]), si(t["peak_bytes"])])
    columns = ["training step", "prompts × queries", "cloud tokens", "edge tokens", "MACs", "ms (range)", "peak B"]
    return Sheet("One training step", columns, rows)


def ratio_sheet(results: Mapping[str, Any]) -> Sheet:
    """Times of one system over another's; below 1 the first is faster."""
    columns = ["ratio of times", "first token", "each later", "answer", "first answer, once included"]
    rows = [[RATIOS[r["of"], r["to"]], *(f"{r[key]:.2g}" for key in RATIO_COLUMNS)] for r in results["ratios"]]
    return Sheet("Ratios of times; below 1 the first is faster", columns, rows)


def print_report(results: Mapping[str, Any]) -> None:
    """All tables, then break-even points and remarks, on standard output."""
    to_screen(speed_sheet(results), macs_sheet(results), ratio_sheet(results))
    if results["training"]:
        to_screen(training_sheet(results))
    for line in remarks(results):
        print(textwrap.fill(line, 120))


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What the tables do not say."""
    lines = []
    for name, found in results["break_even"].items():
        n, until = found["queries"], f" to query {found['until']} ({found['reason']})" if "until" in found else " on"
        lines.append(
            f"Specializing pays against {name}: " + (f"from query {n}{until}" if n else f"never: {found['reason']}")
        )
    lines += [kept_prefix_remark(results)]
    cloud, merging = (results["specializing"][name]["peak_bytes"] for name in ("cloud", "merge"))
    lines.append(f"Specializing takes {si(cloud)}B for the cloud's pass and at most {si(merging)}B for merging.")
    for pair, (same, count) in results["same_answer"].items():
        lines.append(f"Greedy tokens {pair}: {same} of {count}")
    lines += [f"Without {name}: {reason}" for name, reason in results["left_out"].items()]
    if "skipped" in results["transformers"]:
        lines.append(f"Without transformers' times: {results['transformers']['skipped']}")
    lines.append(f"Generator: {results['generator']}.")
    if results["training"]:
        rows = [(METHODS[key].title, row) for key, row in PUBLISHED.items() if key in METHODS]
        answers = ", ".join(f"{title} {si(row['macs'])}MACs {row['latency_s']} s" for title, row in rows)
        steps = ", ".join(f"{title} {row['step_s']} s" for title, row in rows)
        source = f"{PUBLISHED['model']}, Table 13, A100"
        lines.append(f"Published ({source}): inference {answers}; training step {steps}.")
    bad = disagreements(results)
    lines += [f"DISAGREEMENT of formula and compiler: {line}" for line in bad]
    if not bad:
        lines.append("Multiply-adds by formula and by the compiler agree within 2 % everywhere.")
    return lines


def kept_prefix_remark(results: Mapping[str, Any]) -> str:
    """Why a specialized model and a kept prefix are close, in figures."""
    memory, methods = results["kept_prefix"], results["methods"]
    fewer = 1 - methods[OWN]["macs"]["answer"] / methods[KEPT_PREFIX]["macs"]["answer"]
    share = 100 * memory["bytes"] / memory["weight_bytes"]
    return (
        f"Behind a kept prefix an answer takes the same linear layers as a specialized one. Specializing saves"
        f" {100 * fewer:.1f} % of the multiply-adds, all in attention, and the keys and values of {memory['tokens']}"
        f" tokens in every step: {si(memory['bytes'])}B for each task, beside {si(memory['weight_bytes'])}B of weights"
        f" ({share:.1f} %). They take {memory['tokens']} of {memory['positions']} positions."
    )
