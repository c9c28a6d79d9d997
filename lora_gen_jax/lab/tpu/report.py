"""What ``compile`` prints: a program's costs as JSON values and as tables.

In: `Program`s with their `Costs`. Out: plain values, and text on standard output.
"""

from collections.abc import Callable
from typing import Any

from lora_gen_jax.evaluation.sheet import Sheet, to_screen
from lora_gen_jax.lab.tpu.collectives import KINDS, Collective
from lora_gen_jax.lab.tpu.programs import Program
from lora_gen_jax.lab.tpu.roofline import Costs


def program_json(program: Program, cost: Costs) -> dict[str, Any]:
    """The contract's keys, all per chip, and more of them."""
    memory = cost.memory
    return {
        "hbm_gb": memory.total / 1e9,
        "model_flops": cost.model_flops,
        "hlo_flops": cost.flops,
        "hbm_bytes": cost.hbm_bytes,
        "collective_bytes": sum(cost.collective_bytes.values()),
        "compute_s": cost.compute_s,
        "memory_s": cost.memory_s,
        "collective_s": cost.collective_s,
        "bound": cost.bound,
        "roofline_mfu_no_overlap": cost.mfu_no_overlap,
        "roofline_mfu_overlap": cost.mfu_overlap,
        "compile_s": cost.compile_s,
        "mesh": {name: int(size) for name, size in program.mesh.shape.items()},
        "collectives": cost.collective_bytes,
        "dcn_bytes": cost.dcn_bytes,
        "arguments_gb": memory.arguments / 1e9,
        "outputs_gb": memory.outputs / 1e9,
        "temporaries_gb": memory.temporaries / 1e9,
        "code_gb": memory.code / 1e9,
        "fits": memory.total <= cost.chip.hbm,
        "uncounted_kernels": cost.uncounted,
    }


def print_report(summary: dict[str, Any], results: dict[str, tuple[Program, Costs]], listing: bool) -> None:
    """Tables for people; `listing` adds every collective."""
    rows, length = summary["cloud_rows"]
    print(
        f"{summary['topology']}: {summary['chips']} chips in {summary['slices']} slice(s);"
        f" {summary['prompts']} prompts (P) with up to {summary['queries_per_prompt']} queries (Q) each:"
        f" cloud {rows} x {length} tokens, edge {summary['edge_rows'][0]} x {summary['edge_rows'][1]},"
        f" {summary['response_slots']} answer tokens a prompt"
    )
    programs = summary["programs"]
    lines = [(name, *map(cell, programs.values())) for name, cell in _lines(summary["hbm_capacity_gb"])]
    to_screen(Sheet("what a program takes of each chip", ("a chip", *programs), lines), width=150)
    print(
        f"Rates of a chip: {summary['peak_flops'] / 1e12:.0f} Tflop/s in bf16, {summary['hbm_bytes_per_s'] / 1e9:.0f}"
        f" GB/s of HBM, {summary['collective_bytes_per_s'] / 1e9:.0f} GB/s received over the interconnect (how"
        " that is meant: lab/tpu/topology.py)."
    )
    for name, ratio in summary.get("flops_over_lora", {}).items():
        how = "each query behind its prompt" if name == "apart" else "a prompt's queries packed behind it"
        print(f"Model flops of a step over plain LoRA's on the same queries, {how}: {ratio:.2f}")
    for name, (_, cost) in results.items():
        if cost.uncounted:
            print(f"{name}: kernels of unknown cost are not counted: {', '.join(cost.uncounted)}")
        if listing:
            to_screen(_collective_sheet(name, cost.collectives), width=150)


Cell = Callable[[dict[str, Any]], str]


def _lines(capacity: float) -> list[tuple[str, Cell]]:
    return [
        ("mesh", lambda p: " ".join(f"{axis}={size}" for axis, size in p["mesh"].items())),
        ("HBM, GB", lambda p: f"{p['hbm_gb']:.2f} of {capacity:.0f}: {'fits' if p['fits'] else 'DOES NOT FIT'}"),
        ("  arguments", lambda p: f"{p['arguments_gb']:.2f}"),
        ("  outputs", lambda p: f"{p['outputs_gb']:.2f}"),
        ("  temporaries", lambda p: f"{p['temporaries_gb']:.2f}"),
        ("  code", lambda p: f"{p['code_gb']:.2f}"),
        ("model Gflop", lambda p: f"{p['model_flops'] / 1e9:,.5g}"),
        ("executed Gflop", lambda p: f"{p['hlo_flops'] / 1e9:,.5g}"),
        ("HBM traffic, GB", lambda p: f"{p['hbm_bytes'] / 1e9:.4g}"),
        ("collectives, GB", lambda p: f"{p['collective_bytes'] / 1e9:.4g}"),
        *((f"  {kind}", _gigabytes(kind)) for kind in KINDS),
        ("  between slices", lambda p: f"{p['dcn_bytes'] / 1e9:.4g}"),
        ("compute, ms", lambda p: f"{1e3 * p['compute_s']:,.3f}"),
        ("memory, ms", lambda p: f"{1e3 * p['memory_s']:,.3f}"),
        ("collective, ms", lambda p: f"{1e3 * p['collective_s']:,.3f}"),
        ("bound by", lambda p: p["bound"]),
        ("MFU, no overlap", lambda p: f"{100 * p['roofline_mfu_no_overlap']:.1f} %"),
        ("MFU, overlap", lambda p: f"{100 * p['roofline_mfu_overlap']:.1f} %"),
        ("compiled in", lambda p: f"{p['compile_s']:.0f} s"),
    ]


def _gigabytes(kind: str) -> Cell:
    return lambda p: f"{p['collectives'][kind] / 1e9:.4g}"


def _collective_sheet(name: str, collectives: list[Collective]) -> Sheet:
    merged: dict[tuple[str, str, str, str], tuple[float, float]] = {}
    for c in collectives:
        key = (c.kind, c.shape, c.axis, c.op_name)
        size, count = merged.get(key, (0.0, 0.0))
        merged[key] = size + c.bytes, count + c.count
    rows = []
    for (kind, shape, axis, op_name), (size, count) in sorted(merged.items(), key=lambda item: -item[1][0]):
        short = shape if len(shape) <= 48 else f"{shape[:45]}..."
        rows.append((kind, f"{size / 1e6:.2f}", f"{count:.0f}", short, axis, op_name[-70:]))
    return Sheet(f"{name}: collectives", ("kind", "MB", "runs", "shape", "axis", "from"), rows)
