"""Merging a specialisation into SmolLM2's FFN, against streaming the same weights through memory once.

In: nothing (a random pool and random gates; the weights are the real ones). Out: milliseconds, best of several runs,
interleaved so that a slow moment of the machine touches all of them.

Command:  python benchmarks/merge.py [--model smollm2-135m]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax import GeneratorConfig, load_config, load_params, merge, merge_donated
from lora_gen_jax.generator.lora_gen import ExpertPool, gated_adapter

REPEATS = 7


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of one call, and its result."""
    began = time.perf_counter()
    result = jax.block_until_ready(run())
    return (time.perf_counter() - began) * 1000, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    model = parser.parse_args().model
    config, settings = load_config(model), GeneratorConfig()
    base = load_params(model)
    variables = ExpertPool(config, settings.num_experts, settings.rank).init(jax.random.key(0))
    pool = ExpertPool(config, settings.num_experts, settings.rank).apply(variables)
    gates = np.zeros((1, config.num_layers, settings.num_experts), np.float32)
    gates[..., :2] = 0.5
    adapter = gated_adapter(jnp.asarray(gates), pool, settings)
    stream = jax.jit(lambda ffn: jax.tree.map(lambda x: x + 1, ffn), donate_argnums=0)
    ffn = jax.tree.map(jnp.copy, base["layers"]["ffn"])
    donated = jax.tree.map(jnp.copy, base)
    streaming, donating, keeping = "stream the FFN, in place", "merge, donating", "merge, keeping the base"
    times: dict[str, list[float]] = {streaming: [], donating: [], keeping: []}
    for _ in range(REPEATS + 1):
        spent, ffn = timed(lambda held=ffn: stream(held))
        times[streaming].append(spent)
        spent, donated = timed(lambda held=donated: merge_donated(held, adapter))
        times[donating].append(spent)
        spent, _ = timed(lambda: merge(base, adapter))
        times[keeping].append(spent)
    size = sum(x.nbytes for x in jax.tree.leaves(ffn))
    print(f"FFN weights {size / 1e6:.0f} MB, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, values in times.items():
        print(f"{name:<26}{min(values[1:]):8.0f} ms")


if __name__ == "__main__":
    main()
