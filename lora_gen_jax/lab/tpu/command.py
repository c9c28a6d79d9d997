"""``lora-gen compile CONFIG.py --topology v5e:4x4``: what an experiment's programs cost on TPUs that are not there.

In: a config and flags. Out: tables, or JSON, on standard output; what is being compiled on standard error.
"""

import dataclasses
import json
import sys
import time
from typing import Any

import jax

from lora_gen_jax.config import Config
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.lab.tpu.formulas import lora_ratios, model_flops
from lora_gen_jax.lab.tpu.programs import NAMES, Program, Sizes, batch_shapes, build, shapes_pair
from lora_gen_jax.lab.tpu.report import print_report, program_json
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
    names = tuple(name.strip() for name in flags.programs.split(",") if name.strip())
    if not names or not set(names) <= set(NAMES):
        raise ConfigError(
            f"--programs is {flags.programs!r}", field="--programs", remedy=f"name some of {', '.join(NAMES)}"
        )
    if config.method != GENERATOR.key and flags.programs == CompileFlags.programs:
        names = tuple(name for name in names if name != "specialise")
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
