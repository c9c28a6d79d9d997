"""``lora-gen compile CONFIG.py --topology v5e:4x4``: what an experiment's programs cost on TPUs that are not there.

In: a config and flags. Out: tables, or JSON, on standard output; what is being compiled on standard error.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from lora_gen_jax.config import Config
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.sheet import Sheet, to_screen
from lora_gen_jax.files import listed
from lora_gen_jax.lab.tpu.collectives import KINDS, Collective
from lora_gen_jax.lab.tpu.formulas import lora_ratios, model_flops
from lora_gen_jax.lab.tpu.programs import NAMES, Program, Sizes, batch_shapes, build, shapes_pair
from lora_gen_jax.lab.tpu.roofline import Costs, costs
from lora_gen_jax.lab.tpu.topology import Topology, get_topology
from lora_gen_jax.methods.registry import GENERATOR
from lora_gen_jax.models import Pair
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training.fit import fitted


@dataclasses.dataclass(frozen=True)
class CompileFlags:
    """Flags of compile beside those of the config."""

    topology: str = ""
    """Chips to compile for, as v5e:4x4, v5p:2x2x4, or 2*v5e:4x4 for two slices."""
    programs: str = ",".join(NAMES)
    """Which programs, separated by commas."""
    json: bool = False
    """Print JSON instead of tables."""
    collectives: bool = False
    """Also list every distinct collective, those that move most bytes first."""
    rows: int = Sizes.rows
    """Sequences a chip that prefill and decode work on; their weights lie whole on every chip."""
    input_tokens: int = Sizes.tokens
    """Tokens of a sequence that prefill reads."""
    cache_slots: int = Sizes.slots
    """Slots of the cache that decode reads, all of them filled."""


def run(config: Config, flags: CompileFlags) -> dict[str, Any]:
    """Compiles, prints, and returns what ``--json`` prints.

    Raises:
        LoraGenError: for bad input, for a topology that does not exist, and when a program does not fit the chips.
    """
    names = listed(flags.programs)
    if not names or not set(names) <= set(NAMES):
        raise ConfigError(
            f"--programs is {flags.programs!r}", field="--programs", remedy=f"name some of {', '.join(NAMES)}"
        )
    if config.method != GENERATOR.key and flags.programs == CompileFlags.programs:
        names.remove("specialise")
    if not flags.topology:
        raise ConfigError("name the chips to compile for: --topology v5e:4x4", field="--topology", code="missing")
    sizes = Sizes(flags.rows, flags.input_tokens, flags.cache_slots)
    if min(dataclasses.astuple(sizes)) < 1:
        raise ConfigError("--rows, --input-tokens and --cache-slots must be at least 1", field="--rows")
    topology = get_topology(flags.topology)
    pair = shapes_pair(config)
    if "train_step" in names:
        mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=topology.devices)
        batch = batch_shapes(config, pair.edge.config.num_layers)
        pair, line = fitted(config, pair, mesh, batch, lambda: topology.chip.hbm)
        if line is not None:
            print(line, file=sys.stderr, flush=True)
    results: dict[str, tuple[Program, Costs]] = {}
    for program in build(config, pair, topology.devices, names, sizes):
        print(f"compiling {program.name} for {topology.name}", file=sys.stderr, flush=True)
        flops = model_flops(program.name, config, pair, sizes, len(topology.devices)) / len(topology.devices)
        results[program.name] = program, compile_program(program, topology, flops)
    summary = as_json(config, pair, topology, results)
    if flags.json:
        print(json.dumps(summary, indent=2))
    else:
        print_report(summary, results, flags.collectives)
    return summary


def compile_program(program: Program, topology: Topology, flops: float) -> Costs:
    """Compiles and counts; `flops` are one chip's model flops.

    Raises:
        ConfigError: when it needs more memory than a chip has.
    """
    began = time.perf_counter()
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.lower().compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
        raise ConfigError(
            f"{program.name} does not fit {topology.name}: {line.strip()}",
            field="--topology",
            code="too small",
            remedy="Take more chips, spread the weights with --mesh.fsdp, keep less with --cloud.remat full and"
            " --edge.remat full, or take fewer rows a chip",
        ) from error
    return costs(compiled, program, topology.chip, flops, time.perf_counter() - began)


def as_json(
    config: Config, pair: Pair, topology: Topology, results: dict[str, tuple[Program, Costs]]
) -> dict[str, Any]:
    """The contract's JSON, and more keys."""
    data = config.data
    summary = {
        "topology": topology.name,
        "chips": len(topology.devices),
        "slices": topology.slices,
        "prompts": data.prompts_per_step,
        "queries_per_prompt": data.queries_per_prompt,
        "cloud_rows": [data.prompts_per_step // data.prompts_per_row, data.cloud_length],
        "edge_rows": [data.prompts_per_step, data.edge_length],
        "response_slots": data.response_slots,
        "hbm_capacity_gb": topology.chip.hbm / 1e9,
        "peak_flops": topology.chip.flops,
        "hbm_bytes_per_s": topology.chip.hbm_rate,
        "collective_bytes_per_s": topology.chip.receive_rate,
        "programs": {name: program_json(program, cost) for name, (program, cost) in results.items()},
    }
    if config.method == GENERATOR.key:
        summary["flops_over_lora"] = lora_ratios(config, pair)
    return summary


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
        *((f"  {kind}", lambda p, kind=kind: f"{p['collectives'][kind] / 1e9:.4g}") for kind in KINDS),
        ("  between slices", lambda p: f"{p['dcn_bytes'] / 1e9:.4g}"),
        ("compute, ms", lambda p: f"{1e3 * p['compute_s']:,.3f}"),
        ("memory, ms", lambda p: f"{1e3 * p['memory_s']:,.3f}"),
        ("collective, ms", lambda p: f"{1e3 * p['collective_s']:,.3f}"),
        ("bound by", lambda p: p["bound"]),
        ("MFU, no overlap", lambda p: f"{100 * p['roofline_mfu_no_overlap']:.1f} %"),
        ("MFU, overlap", lambda p: f"{100 * p['roofline_mfu_overlap']:.1f} %"),
        ("compiled in", lambda p: f"{p['compile_s']:.0f} s"),
    ]


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
