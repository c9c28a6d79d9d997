"""One training step against the machine: its time, its multiply-adds, and the share of the matmul rate it reaches.

In: a config. Out: lines on standard output. The matmul rate is measured before and after the steps, and the better
is taken, so that the share is not flattered by a slow moment.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_gen_jax.config import Config
from lora_gen_jax.data.pipeline import Batch, Shard, build_batch
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import Pair, load_pair, precision_of
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training.cost import method_cost
from lora_gen_jax.training.fit import fitted
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.prepare import check_rows, keep_freed_memory, make_sampler, place, training_tasks
from lora_gen_jax.training.step import init_state, make_train_step

STEPS = 5


def bench(config: Config) -> dict[str, float]:
    """Prints and returns the figures: seconds, GMACs, the matmul rate and the share of it that is reached.

    Raises LoraGenError as training, for bad input.
    """
    keep_freed_memory()
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check_rows(config, mesh)
    pair = load_pair(config, mesh, training=True)
    sampler = make_sampler(config, pair, training_tasks(config), "train")
    assert sampler is not None
    host = build_batch(sampler, (config.train.seed, 0), Shard())
    cost = method_cost(config, pair.cloud.config, pair.edge.config, host)
    decoder = pair.edge.decoder
    dtype = decoder.dtype if decoder.operands is None else decoder.operands
    rate = matmul_rate(dtype=dtype)
    with jax.set_mesh(mesh):
        compiled, times = timed_steps(config, pair, mesh, host)
    # One device's; those of a CPU are the same cores.
    devices = 1 if jax.default_backend() == "cpu" else mesh.size
    rate = max(rate, matmul_rate(dtype=dtype)) * devices
    seconds = statistics.median(times)
    figures = {
        "seconds": seconds,
        "gmacs": cost.total / 1e9,
        "matmul_gmacs_per_second": rate / 1e9,
        "share": cost.total / rate / seconds,
        "cloud_fill": float(np.mean(host.prompts.positions_BT >= 0)),
        "edge_fill": float(np.mean(host.positions_PT >= 0)),
    }
    parts = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in vars(cost).items())
    print(f"step         {seconds:.2f} s (median of {STEPS}; {min(times):.2f} to {max(times):.2f})")
    print(f"multiply-adds {cost.total / 1e9:.0f} G, forward and backward without recomputation ({parts})")
    print(f"matmul rate  {rate / 1e9:.0f} GMAC/s in {precision_of(pair.edge)}, {jax.device_count()} device(s)")
    print(f"share        {100 * figures['share']:.0f} % of the matmul rate")
    cloud, edge = 100 * figures["cloud_fill"], 100 * figures["edge_fill"]
    print(f"tokens       {cloud:.0f} % of the cloud's slots, {edge:.0f} % of the edge's are not padding")
    memory = compiled.memory_analysis()
    if memory is not None:
        print(f"memory       {memory.temp_size_in_bytes / 1e9:.2f} GB beside weights and state")
    return figures


def timed_steps(config: Config, pair: Pair, mesh: Mesh, host: Batch) -> tuple[Any, list[float]]:
    """The compiled step, and the seconds of `STEPS` of them after a first one, all on the same batch."""
    batch = place(host, mesh)
    pair, kept = fitted(config, pair, mesh, batch)
    if kept is not None:
        print(kept)
    generator, optimizer = make_generator(config, pair), make_optimizer(config.train)
    state = init_state(generator, optimizer, pair.frozen, batch, config.train.seed)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    step = make_train_step(generator, pair.edge.decoder, optimizer, config)
    compiled, times = step.lower(state, pair.frozen, batch).compile(), []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        state, metrics = compiled(state, pair.frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    return compiled, times[1:]


def matmul_rate(size: int = 2048, repeats: int = 5, dtype: Any = jnp.float32) -> float:
    """MACs per second of the best of several square matmuls of this `size` on the default device.

    Operands are of `dtype`; the result is of the same type on an accelerator and in fp32 on a CPU.
    """
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    result = jnp.float32 if jax.default_backend() == "cpu" else dtype
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=result))
    multiply(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return size**3 / best
