"""``lora-gen efficiency CONFIG.py``: what answering costs with and without a specialized model.

In: a config and flags. Out: tables on standard output, and efficiency.json in a directory of its own.
"""

import dataclasses
import resource
from pathlib import Path
from typing import Any

import jax

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import to_json
from lora_gen_jax.errors import CheckpointError, ConfigError
from lora_gen_jax.evaluation.run import machine
from lora_gen_jax.files import check_output, complete_directory, listed, text_argument, write_json
from lora_gen_jax.generator.cloud import pack_prompts
from lora_gen_jax.lab.costs import measure as efficiency
from lora_gen_jax.lab.costs import transformers_peer
from lora_gen_jax.lab.costs.methods import KEPT_PREFIX, UNTRAINED_ROWS, answering, workload_of_sizes, workload_of_texts
from lora_gen_jax.lab.costs.report import PUBLISHED, derived, disagreements, print_report
from lora_gen_jax.lab.costs.training import training_costs
from lora_gen_jax.methods.answering import Ready, Setup, Workload
from lora_gen_jax.methods.registry import GENERATOR, make_generator
from lora_gen_jax.models import Pair, load_pair
from lora_gen_jax.training.checkpoint import check_method, check_models, find_checkpoint, versions

# What the report compares; a method beside these that cannot run with the config is left out.
NEEDED = (*UNTRAINED_ROWS, GENERATOR.key)


@dataclasses.dataclass(frozen=True)
class EfficiencyFlags:
    """Flags of efficiency beside those of the config."""

    checkpoint: Path | None = None
    """A work directory or a checkpoint; left out, the config's own work directory, else the one shipped for it, else
    untrained weights."""
    out: Path | None = None
    """Directory for efficiency.json; left out, efficiency-<n> in the work directory."""
    instruction_tokens: int = 200
    """Tokens of the instruction, for the cloud and for in-context learning."""
    input_tokens: int = 100
    """Tokens of a query."""
    new_tokens: int = 32
    """Tokens of an answer."""
    batch_sizes: str = "1,8"
    """Rows of the batches whose tokens per second are measured, separated by commas."""
    prompt: str | None = None
    """A real instruction instead of --instruction-tokens, or @FILE; with --input."""
    input: str | None = None
    """A real query instead of --input-tokens, or @FILE; with --prompt."""
    repeats: int = 5
    """Repetitions of every measurement."""
    torch: bool = True
    """Measure transformers (torch), too."""
    training: bool = True
    """Measure training steps, too."""


def sizes_of(text: str) -> list[int]:
    """Batch sizes from a flag."""
    parts = listed(text)
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        remedy = "give positive numbers separated by commas, as 1,8"
        raise ConfigError(f"--batch-sizes is {text!r}", field="--batch-sizes", remedy=remedy)
    return [int(part) for part in parts]


def run(config: Config, flags: EfficiencyFlags, out: Path) -> dict[str, Any]:
    """Measures, prints, and writes `out`/efficiency.json.

    Raises:
        LoraGenError: for bad input, before anything is measured.
        ConfigError: after everything is written, when formula and compiler disagree about multiply-adds.
    """
    check_output(out)
    batch_sizes = sizes_of(flags.batch_sizes)
    if flags.repeats < 1:
        raise ConfigError(f"--repeats is {flags.repeats}", field="--repeats", remedy="use at least 1")
    if (flags.prompt is None) != (flags.input is None):
        problem = "--prompt and --input belong together"
        remedy = "give both, or neither for random tokens"
        raise ConfigError(problem, field="--input" if flags.input is None else "--prompt", remedy=remedy)
    pair = load_pair(config)
    work = make_workload(pair, flags)
    setup, generator = make_setup(config, pair, work, flags.checkpoint)
    results = measured(setup, flags, batch_sizes)
    results |= {"generator": generator, "training": {}, "published": PUBLISHED}
    if flags.training:
        sizes = (len(work.cloud_prompt), len(work.query))
        results["training"] = training_costs(config, pair, *sizes, min(flags.repeats, 3))
    results |= derived(results)
    results["process_peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with complete_directory(out) as temporary:
        write_json(temporary / "efficiency.json", results)
    print_report(results)
    if wrong := disagreements(results):
        problem = f"formula and compiler disagree about multiply-adds: {'; '.join(wrong)}"
        raise ConfigError(problem, field="edge.source", remedy="Report this model")
    return results


def make_workload(pair: Pair, flags: EfficiencyFlags) -> Workload:
    """From texts where they are given, else from numbers of tokens."""
    if flags.prompt is None or flags.input is None:
        return workload_of_sizes(pair, flags.instruction_tokens, flags.input_tokens, flags.new_tokens)
    texts = text_argument(flags.prompt, "--prompt"), text_argument(flags.input, "--input")
    return workload_of_texts(pair, *texts, flags.new_tokens)


def make_setup(config: Config, pair: Pair, work: Workload, named: Path | None) -> tuple[Setup, str]:
    """The generator, and where it is from; one with untrained weights where none was trained, which costs the same."""
    config = dataclasses.replace(config, method=GENERATOR.key)
    try:
        loaded = find_checkpoint(config, named)
        check_method(loaded, GENERATOR.key)
    except CheckpointError:
        if named is not None:
            raise
        module, layers = make_generator(config, pair), pair.edge.config.num_layers
        # The variables' shapes do not depend on the prompt's length.
        prompts = pack_prompts([work.cloud_prompt[:1]], layers, 1, layers + 1)
        variables = jax.jit(module.init)(jax.random.key(0), pair.cloud.params, prompts)
        return Setup(config, pair, module, variables, work), "untrained (costs do not depend on the weights' values)"
    check_models(loaded.fingerprints, pair.fingerprints, f"checkpoint {loaded.path}")
    module = make_generator(dataclasses.replace(config, generator=loaded.config.generator), pair)
    return Setup(config, pair, module, loaded.variables, work), f"{loaded.path}, step {loaded.step}"


def measured(setup: Setup, flags: EfficiencyFlags, batch_sizes: list[int]) -> dict[str, Any]:
    """Times, memory and multiply-adds of all methods and of transformers."""
    pair, work = setup.pair, setup.work
    edge = pair.edge
    efficiency.say("making the methods ready")
    ready, left_out = made_ready(setup)
    peers, skipped = make_peers(setup, flags)
    times = efficiency.measure({**ready, **peers}, batch_sizes, flags.repeats)
    methods = {name: {"ids": times[name].ids} | one for name, one in efficiency.answers(ready, times).items()}
    kept = ready[KEPT_PREFIX].model.prefix
    assert kept is not None
    return {
        "config": to_json(setup.config),
        "versions": versions(),
        "machine": machine(),
        "setting": setting(flags, work, batch_sizes),
        "methods": methods,
        "left_out": left_out,
        "transformers": {"skipped": skipped} if skipped else described(peers, times, work),
        "specializing": efficiency.specializing_cost(setup),
        "kept_prefix": {
            "tokens": kept.length,
            "bytes": sum(x.nbytes for x in (kept.cache.k_LBSGH, kept.cache.v_LBSGH)),
            "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(edge.params)),
            "positions": edge.config.max_positions,
        },
    }


def made_ready(setup: Setup) -> tuple[dict[str, Ready], dict[str, str]]:
    """Every method ready to answer, and those that are left out with the reason."""
    ready: dict[str, Ready] = {}
    left_out: dict[str, str] = {}
    for name, make in answering().items():
        try:
            ready[name] = make(setup)
        except ConfigError as error:
            if name in NEEDED:
                raise
            left_out[name] = str(error)
    return ready, left_out


def make_peers(setup: Setup, flags: EfficiencyFlags) -> tuple[dict[str, transformers_peer.TorchSystem], str | None]:
    """Transformers' systems, or none and the reason why."""
    skipped = transformers_peer.torch_missing() if flags.torch else "left out by --no-torch"
    if skipped is not None:
        return {}, skipped
    hf = transformers_peer.torch_model(setup.config.edge.source, setup.pair.edge)
    efficiency.say(f"torch is quickest with {transformers_peer.use_quickest_threads(hf, setup.work.whole)} thread(s)")
    return transformers_peer.torch_systems(hf, setup.work), None


def setting(flags: EfficiencyFlags, work: Workload, batch_sizes: list[int]) -> dict[str, Any]:
    """What was asked."""
    return {
        "cloud_tokens": len(work.cloud_prompt),
        "instruction_tokens": work.kept,
        "input_tokens": len(work.query),
        "new_tokens": work.new_tokens,
        "batch_sizes": batch_sizes,
        "repeats": flags.repeats,
        "texts": flags.prompt is not None,
    }


def described(peers: dict[str, Any], times: Any, work: Workload) -> dict[str, Any]:
    """Transformers' figures, as the methods'; it has no account of a program's memory."""
    import torch
    import transformers

    found = {}
    for name, system in peers.items():
        found[name] = {
            "context_tokens": len(system.ids) - system.kept,
            "kept_tokens": system.kept,
            "ids": times[name].ids,
            "peak_bytes": None,
            "copy_ms": None if (copied := system.copy()) is None else efficiency.ms(copied),
            **efficiency.figures(times[name], work.new_tokens),
        }
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    return {"systems": found, **versions}
