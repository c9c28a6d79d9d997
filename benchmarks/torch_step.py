"""This project's training step against the same step in torch and transformers: the same numbers, and their time.

In: the tasks' original files, or tensorflow-datasets. Out: for each step the seconds of both, their ratio and both
losses; then medians and the largest difference of a loss, which has a limit. Both train from the same
parameters (B is moved away from zero, where most gradients vanish) on the same batches, by turns, so that a slow moment
of the machine touches both; a first step that compiles is not timed. Without dropout, whose draws
two libraries do not share, and at the paper's learning rate: at the config's own, fifty times as high, the two runs
part by 1e-3 of the loss within five updates. What torch's step is: `torch_lora_gen.py`, `torch_trainer.py`.

--dtype float32 computes both in fp32. --dtype bfloat16 holds this project's mixed precision against torch's autocast
in bf16: both round the operands of large products; torch rounds their results, too.

Command:  python benchmarks/torch_step.py --data.dir DIR [--steps 5] [--dtype bfloat16] [--config FILE] [--any.field …]
Needs the `test` extra (torch), and 12 GB of memory with the default config.
"""

import os

# Before torch starts its threads: by default they wait for each other in a loop, and beside other work on the machine
# a step then takes two to four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch_trainer import TorchTrainer

from lora_gen_jax.config import Config, TrainConfig
from lora_gen_jax.config_file import config_from_args
from lora_gen_jax.data.pipeline import Batch, Shard, build_batch
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import Pair, load_pair
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.prepare import keep_freed_memory, make_sampler, place, training_tasks
from lora_gen_jax.training.step import TrainState, init_state, make_train_step

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2_135m.py"
# Of the two losses, relative. In bf16 a number of either side is off by 2^-8 of itself at most; the mean loss of some
# hundred tokens, whose errors have random signs, by less.
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 2**-8}
# Of LoRA's B at the start: about what a short training run leaves.
B_STD = 0.01

Step = Callable[[Batch], dict[str, float]]


def move_b(state: TrainState, seed: int = 0) -> TrainState:
    """The state with noise for LoRA's B: at zero, A, the gates and the router would have no gradient."""
    rng = np.random.default_rng(seed)

    def moved(path: Any, value: jax.Array) -> jax.Array:
        noise = rng.standard_normal(value.shape, np.float32)
        return jnp.asarray(B_STD * noise) if str(path[-1].key).endswith("_b") else value

    return state.replace(params=jax.tree_util.tree_map_with_path(moved, state.params))


def both_steps(config: Config, pair: Pair, mesh: Any, batch: Batch, dtype: str) -> tuple[Step, Step]:
    """(ours, torch's): each updates its own copy of the same parameters and returns the step's figures."""
    generator, optimizer = make_generator(config, pair), make_optimizer(config.train)
    state = move_b(init_state(generator, optimizer, pair.frozen, place(batch, mesh), config.train.seed))
    # Before the first step: it takes the state's memory.
    trainer = TorchTrainer(pair, config, jax.device_get(state.params), dtype)
    train_step = make_train_step(generator, pair.edge.decoder, optimizer, config)

    def ours(batch: Batch) -> dict[str, float]:
        nonlocal state
        state, metrics = train_step(state, pair.frozen, place(batch, mesh))
        return {name: float(value) for name, value in jax.block_until_ready((state, metrics))[1].items()}

    return ours, trainer.step


def timed(step: Step, batch: Batch) -> tuple[float, dict[str, float]]:
    """Seconds of one step, and its figures."""
    began = time.perf_counter()
    figures = step(batch)
    return time.perf_counter() - began, figures


def compare(config: Config, steps: int, dtype: str) -> float:
    """Prints a line a step and the medians; returns the largest relative difference of a loss."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    pair = load_pair(config, mesh, training=True)
    sampler = make_sampler(config, pair, training_tasks(config), "train")
    assert sampler is not None
    batches = [build_batch(sampler, (config.train.seed, number), Shard()) for number in range(steps + 1)]
    ours, theirs = both_steps(config, pair, mesh, batches[0], dtype)
    print(f"{'step':<9}{'ours':>9}{'torch':>9}{'ratio':>7}{'loss, ours':>13}{'loss, torch':>13}{'difference':>12}")
    pairs, differences = [], []
    for number, batch in enumerate(batches):
        (a, mine), (b, other) = timed(ours, batch), timed(theirs, batch)
        differences.append(abs(mine["loss"] - other["loss"]) / abs(other["loss"]))
        name = str(number) if number else "warm-up"
        losses = f"{mine['loss']:13.6f}{other['loss']:13.6f}{differences[-1]:12.1e}"
        print(f"{name:<9}{a:7.2f} s{b:7.2f} s{a / b:7.2f}{losses}", flush=True)
        pairs += [(a, b)] if number else []
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    print(f"median   {mine:7.2f} s{other:7.2f} s")
    print(f"ratio    {mine / other:.2f} of the medians, ours to torch; {min(ratios):.2f} to {max(ratios):.2f} by step")
    print(f"loss     {max(differences):.1e} at most between the two, relative; {LARGEST_DIFFERENCE[dtype]:.1e} allowed")
    return max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of large products")
    parser.add_argument("--config", type=Path, default=CONFIG, help="whose fields the other flags override")
    args, rest = parser.parse_known_args()
    fixed = ["--generator.dropout", "0", "--train.learning_rate", str(TrainConfig().learning_rate)]
    own = "mixed" if args.dtype == "bfloat16" else "float32"
    fixed += ["--cloud.dtype", own, "--edge.dtype", own]
    config = config_from_args("benchmarks/torch_step.py", [str(args.config), *fixed, *rest])
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    # transformers would repeat keys and values for every query head under a mask; torch's kernel on a CPU need not.
    os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    # Of the whole process, so torch's tensors gain by it as well.
    keep_freed_memory()
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}; {threads} threads, {jax.devices()[0].device_kind}")
    if compare(config, args.steps, args.dtype) > LARGEST_DIFFERENCE[args.dtype]:
        sys.exit("the two losses differ: the steps do not compute the same")


if __name__ == "__main__":
    main()
