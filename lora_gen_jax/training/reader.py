"""Teaches the router's first layers to tell tasks apart, before anything else is trained.

In: a fresh state, and training batches of which only the prompts count. Out: the state with other f1 and f2, and with
the statistics that standardize what they read and give. Next-token loss teaches slowly that prompts of one task want
the same gates; a contrastive loss on states that the cloud model gives once teaches it in seconds.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_gen_jax.config import Config
from lora_gen_jax.errors import DataError
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.sharding import replicate
from lora_gen_jax.training.step import TrainState

PAIRS, TEMPERATURE, DROPOUT, LEARNING_RATE = 192, 0.1, 0.4, 1e-3
_LEAST_DEVIATION = 1e-3
_ROWS = 256

Layers = tuple[jax.Array, jax.Array]
"""f1 [X, H] and f2 [H, N]."""


def teach_reader(
    state: TrainState, generator: LoRAGen, frozen_cloud: Any, batches: Iterable[Any], config: Config
) -> TrainState:
    """The state with measured statistics and, if `train.reader_steps` asks for it, with f1 and f2 taught.

    Without heads, f2 gives logits and stays as it starts: what f1 is compared through is then dropped.

    Args:
        state: fresh.
        generator: the module.
        frozen_cloud: the cloud model's weights.
        batches: whose prompts are read, with the number of each prompt's task.
        config: of the run.

    Raises:
        DataError: when fewer than two tasks have two prompts among those read.
    """
    states_BLX, tasks_B = read_prompts(state, generator, frozen_cloud, batches)
    router, stats = dict(state.params["router"]), dict(state.batch_stats["router"])
    mean_LX, deviation_LX = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    if config.generator.standardize:
        mean_LX = np.mean(states_BLX, axis=0, dtype=np.float32)
        deviation_LX = np.std(states_BLX, axis=0, dtype=np.float32) + _LEAST_DEVIATION
        stats["input"] = {"mean": mean_LX, "deviation": deviation_LX}

    def rows(index: np.ndarray) -> np.ndarray:
        return (states_BLX[index].astype(np.float32) - mean_LX) / deviation_LX

    layers = (router["f1"], router["f2"])
    if config.train.reader_steps:
        layers = contrast(layers, rows, tasks_B, config.train.reader_steps, config.train.seed)
        router["f1"] = layers[0]
        if config.generator.router_heads == "per_layer":
            router["f2"] = layers[1]
    if "center" in stats:
        parts = np.array_split(np.arange(len(tasks_B)), -(-len(tasks_B) // _ROWS))
        center_LN = sum(np.sum(points(layers, rows(part)), axis=0) for part in parts) / len(tasks_B)
        stats["center"] = {"mean": center_LN, "deviation": np.ones_like(center_LN)}
    params = {**state.params, "router": router}
    taught = state.replace(params=params, batch_stats={**state.batch_stats, "router": stats})
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), taught, state)


def read_prompts(
    state: TrainState, generator: LoRAGen, frozen_cloud: Any, batches: Iterable[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """What the router reads of every prompt, [B, L, X] in half precision, and the numbers of their tasks, [B]."""

    @jax.jit
    def read(params: Any, frozen: Any, prompts: Any) -> Any:
        return replicate((generator.encoder(parent=None).apply(params, frozen, prompts), prompts.tasks_P))

    params = {"params": state.params["cloud"]}
    found = [jax.device_get(read(params, frozen_cloud, batch.prompts)) for batch in batches]
    # Half precision: thousands of prompts stay in memory.
    return np.concatenate([states.astype(np.float16) for states, _ in found]), np.concatenate([t for _, t in found])


def contrast(
    layers: Layers, rows: Callable[[np.ndarray], np.ndarray], tasks_B: np.ndarray, steps: int, seed: int
) -> Layers:
    """f1 and f2 after `steps` of the supervised contrastive loss (Khosla et al. 2020) between prompts of one task.

    Every step compares two prompts of each of up to `PAIRS` tasks.

    Args:
        layers: f1 [X, H] and f2 [H, N].
        rows: what f1 reads of the prompts with these numbers, [b, L, X].
        tasks_B: the task of every prompt.
        steps: of AdamW with a cosine.
        seed: of batches and dropout.

    Raises:
        DataError: when fewer than two tasks have two prompts.
    """
    twins = [np.flatnonzero(tasks_B == task) for task in np.unique(tasks_B)]
    twins = [places for places in twins if len(places) > 1]
    if len(twins) < 2:
        problem = "fewer than two tasks have two prompts among those the reader was to learn from"
        raise DataError(problem, field="train.reader_prompts", remedy="raise train.reader_prompts")
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=0.01)
    memory = optimizer.init(layers)

    @jax.jit
    def step(layers: Layers, memory: Any, x_BLX: jax.Array, tasks_B: jax.Array, key: jax.Array) -> Any:
        gradients = jax.grad(contrastive_loss)(layers, x_BLX, tasks_B, key)
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = optimizer.update(gradients, memory, layers)
        return optax.apply_updates(layers, updates), memory

    for number in range(steps):
        chosen = rng.choice(len(twins), size=min(PAIRS, len(twins)), replace=False)
        index = np.concatenate([rng.choice(twins[place], size=2, replace=False) for place in chosen])
        key_of_step = jax.random.fold_in(key, number)
        layers, memory = step(layers, memory, rows(index), np.repeat(chosen, 2), key_of_step)
    return layers


def points(layers: Layers, x_BLX: Any) -> jax.Array:
    """f2(SiLU(f1(x))), [B, L, N]."""
    return jax.nn.silu(x_BLX @ layers[0]) @ layers[1]


def contrastive_loss(layers: Layers, x_BLX: jax.Array, tasks_B: jax.Array, key: jax.Array | None) -> jax.Array:
    """-mean log of the share that a prompt's twins have in the softmax of its cosines with all others, a scalar.

    Cosines are those of the points' means over L, centered in the batch, divided by `TEMPERATURE`.

    Args:
        layers: f1 [X, H] and f2 [H, N].
        x_BLX: what f1 reads of B prompts.
        tasks_B: their tasks; every task at least twice.
        key: of the dropout on x; None for none.
    """
    if key is not None:
        kept = jax.random.bernoulli(key, 1 - DROPOUT, x_BLX.shape)
        x_BLX = jnp.where(kept, x_BLX / (1 - DROPOUT), 0.0)
    point_BN = jnp.mean(points(layers, x_BLX), axis=1)
    point_BN = point_BN - jnp.mean(point_BN, axis=0, keepdims=True)
    point_BN = point_BN * jax.lax.rsqrt(jnp.sum(jnp.square(point_BN), axis=1, keepdims=True) + 1e-12)
    itself_BB = jnp.eye(len(x_BLX), dtype=bool)
    log_share_BB = jax.nn.log_softmax(jnp.where(itself_BB, -jnp.inf, point_BN @ point_BN.T / TEMPERATURE), axis=1)
    twin_BB = (tasks_B[:, None] == tasks_B[None, :]) & ~itself_BB
    return -jnp.sum(jnp.where(twin_BB, log_share_BB, 0.0)) / jnp.sum(twin_BB.astype(float))
