"""Time, memory and multiply-adds of an answer, for this project's methods and for transformers on the same machine.

In: methods made ready, a transformers model or none. Out: dictionaries of plain numbers, as efficiency.json holds
them. All systems take turns, repetition by repetition, so that a slow moment of the machine hits them alike.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.buckets import bucket
from lora_gen_jax.generator.cloud import pack_prompts
from lora_gen_jax.inference import cost
from lora_gen_jax.inference.edge_model import forward_only
from lora_gen_jax.lab.costs.transformers_peer import TorchSystem
from lora_gen_jax.methods.answering import Ready, Setup

# After each answer: the other library's idle threads spin for a while before they sleep.
PAUSE = 0.02


@dataclasses.dataclass
class Timings:
    """Seconds by repetition.

    Attributes:
        once: stages of what is done once a task.
        first, total: to the first and to the last token of one answer.
        batches: to the last token, by number of rows.
        ids: the answer.
    """

    once: list[dict[str, float]] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    total: list[float] = dataclasses.field(default_factory=list)
    batches: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    ids: list[int] = dataclasses.field(default_factory=list)


def measure(systems: Mapping[str, Ready | TorchSystem], batch_sizes: Sequence[int], repeats: int) -> dict[str, Timings]:
    """Times all systems in turns; the first turn of each kind compiles and is dropped."""
    found = {name: Timings() for name in systems}
    for turn in range(repeats + 1):
        say(f"answers, turn {turn} of {repeats}" if turn else "answers, first turn: compiling")
        for name, system in systems.items():
            once, (first, total, ids) = system.once(), system.answer()
            time.sleep(PAUSE)
            if turn:
                times = found[name]
                times.once.append(once)
                times.first.append(first)
                times.total.append(total)
                times.ids = ids
    for rows in batch_sizes:
        if rows == 1:
            for times in found.values():
                times.batches[1] = times.total
            continue
        say(f"batches of {rows}")
        for turn in range(min(repeats, 3) + 1):
            for name, system in systems.items():
                seconds = system.batch(rows)
                time.sleep(PAUSE)
                if turn:
                    found[name].batches.setdefault(rows, []).append(seconds)
    return found


def figures(times: Timings, new_tokens: int) -> dict[str, Any]:
    """Medians and spread, in milliseconds; tokens a second by number of rows."""
    once = {name: ms(statistics.median(t[name] for t in times.once)) for name in times.once[0]}
    return {
        "once_ms": once,
        "first_token_ms": ms(statistics.median(times.first)),
        # Between the quickest runs: first and last token are timed in different ones, and noise would not cancel.
        "per_token_ms": ms((min(times.total) - min(times.first)) / (new_tokens - 1)),
        "answer_ms": ms(statistics.median(times.total)),
        "answer_ms_range": [ms(min(times.total)), ms(max(times.total))],
        "first_answer_ms": ms(
            statistics.median(sum(t.values()) + total for t, total in zip(times.once, times.total, strict=True))
        ),
        "tokens_per_s": {str(n): round(n * new_tokens / statistics.median(t), 1) for n, t in times.batches.items()},
    }


def ms(seconds: float) -> float:
    """Milliseconds, to the microsecond."""
    return round(seconds * 1000, 3)


def peak_bytes(compiled: Any) -> int | None:
    """Arguments, temporaries and results of a compiled program, memory that results share with arguments once."""
    m = compiled.memory_analysis()
    if m is None:
        return None
    return m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def answer_cost(ready: Ready) -> dict[str, Any]:
    """Memory of an answer's programs, and its multiply-adds by formula and by the compiler."""
    decoder, params, adapter = ready.model.decoder, ready.model.params, ready.model.adapter
    sizes = cost.Sizes(len(ready.ids), ready.kept, ready.new_tokens, adapter=ready.adapter_macs)
    program = forward_only(decoder)
    peaks = [peak_bytes(cost.lower_pass(program, params, adapter, one).compile()) for one in sizes.executed]
    needed = cost.answer_macs(decoder.config, sizes)
    result: dict[str, Any] = {
        "peak_bytes": None if None in peaks else max(peak for peak in peaks if peak is not None),
        "macs": {"prefill": needed[0], "answer": sum(needed)},
    }
    for name, one in zip(("executed_prefill", "executed_token"), sizes.executed, strict=True):
        formula = cost.pass_macs(decoder.config, one).total
        result["macs"][name] = compared(formula, cost.count_pass(decoder, params, adapter, one))
    return result


def answers(ready: Mapping[str, Ready], times: Mapping[str, Timings]) -> dict[str, dict[str, Any]]:
    """What an answer of each method reads, takes and costs; merged methods that read as much run the same programs."""
    found, costs = {}, dict[Any, dict[str, Any]]()
    for name, one in ready.items():
        program = (len(one.ids), one.kept, None if one.model.adapter is None else name)
        if program not in costs:
            say(f"memory and multiply-adds of {name}")
            costs[program] = answer_cost(one)
        sizes = {"context_tokens": len(one.ids), "kept_tokens": one.kept}
        found[name] = sizes | figures(times[name], one.new_tokens) | costs[program]
    return found


def specializing_cost(setup: Setup) -> dict[str, Any]:
    """Memory and multiply-adds of the cloud's pass and of merging."""
    pair, config = setup.pair, setup.generator.settings
    edge, read = pair.edge.config, setup.work.cloud_prompt
    # In the shape in which `specialize` hands it to the compiled program.
    packed = pack_prompts([read], edge.num_layers, 1, bucket(len(read) + edge.num_layers))
    cloud = pair.cloud.decoder.clone(unroll=pair.cloud.config.num_layers, remat="none")
    unrolled = setup.generator.clone(decoder=cloud)

    def lower(generator: Any) -> Any:
        return jax.jit(generator.apply).lower(setup.variables, pair.cloud.params, packed)

    merging = jax.jit(merge).lower(pair.edge.params, setup.specialize())
    formula = cost.specialize_macs(pair.cloud.config, edge, config, packed.tokens_BT.shape[1])
    counted = cost.count(merging)
    # One loop a site, its body a layer: XLA's analysis counts one layer.
    everything = None if counted.everything is None else counted.everything * edge.num_layers
    whole = cost.Counted(counted.matmuls, everything)
    return {
        "cloud": {
            "peak_bytes": peak_bytes(lower(setup.generator).compile()),
            "macs": compared(formula, cost.count(lower(unrolled))),
        },
        "merge": {"peak_bytes": peak_bytes(merging.compile()), "macs": compared(cost.merge_macs(edge, config), whole)},
    }


def compared(formula: int, counted: cost.Counted) -> dict[str, Any]:
    """Both counts of a program and by what share the compiler's is larger."""
    everything = counted.everything
    return {
        "formula": formula,
        "compiler": counted.matmuls,
        "difference": round(cost.difference(formula, counted.matmuls), 6),
        "with_elementwise": everything,
        "elementwise_share": None if everything is None else round(everything / formula - 1, 6),
        "agrees": abs(cost.difference(formula, counted.matmuls)) <= cost.TOLERANCE,
    }


def say(message: str) -> None:
    """A line of progress."""
    print(f"efficiency: {message}", file=sys.stderr, flush=True)
