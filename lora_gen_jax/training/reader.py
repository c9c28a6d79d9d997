"""Teaches the router's first layer to tell tasks apart, before anything else is trained.

In: a fresh state, and training batches of which only the prompts count. Out: the state with another f1, and with the
statistics that standardize what f1 reads. Next-token loss teaches slowly that prompts of one task want the same gates;
a contrastive loss on states that the cloud model gives once teaches it in seconds.
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
from lora_gen_jax.sharding import whole
from lora_gen_jax.training.step import TrainState

PAIRS, PROJECTED, TEMPERATURE, DROPOUT, LEARNING_RATE = 192, 128, 0.1, 0.3, 1e-3
_LEAST_DEVIATION = 1e-3


def teach_reader(
    state: TrainState, generator: LoRAGen, frozen_cloud: Any, batches: Iterable[Any], config: Config
) -> TrainState:
    """The state with a taught f1 (if `train.reader_steps` asks for it) and measured input statistics.

    Args:
        state: fresh.
        generator: the module.
        frozen_cloud: the cloud model's weights.
        batches: whose prompts are read, with the number of each prompt's task.
        config: of the run.

    Raises:
        DataError: when no task has two prompts among those read.
    """

    @jax.jit
    def read(params: Any, frozen: Any, prompts: Any) -> Any:
        return whole((generator.encoder(parent=None).apply(params, frozen, prompts), prompts.tasks_P))

    found = [jax.device_get(read({"params": state.params["cloud"]}, frozen_cloud, b.prompts)) for b in batches]
    # Half precision: thousands of prompts stay in memory.
    states_NLX = np.concatenate([states.astype(np.float16) for states, _ in found])
    tasks_N = np.concatenate([tasks for _, tasks in found])
    router, stats = dict(state.params["router"]), dict(state.batch_stats)
    mean_LX = np.mean(states_NLX, axis=0, dtype=np.float32)
    deviation_LX = np.std(states_NLX, axis=0, dtype=np.float32) + _LEAST_DEVIATION
    if config.generator.standardize:
        stats["router"] = {**stats["router"], "input": {"mean": mean_LX, "deviation": deviation_LX}}
    else:
        mean_LX, deviation_LX = np.zeros_like(mean_LX), np.ones_like(deviation_LX)

    def rows(index: np.ndarray) -> np.ndarray:
        return (states_NLX[index].astype(np.float32) - mean_LX) / deviation_LX

    if config.train.reader_steps:
        router["f1"] = contrast(router["f1"], rows, tasks_N, config.train.reader_steps, config.train.seed)
    params = {**state.params, "router": router}
    taught = state.replace(params=params, batch_stats=stats)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), taught, state)


def contrast(
    f1: jax.Array, rows: Callable[[np.ndarray], np.ndarray], tasks_N: np.ndarray, steps: int, seed: int
) -> jax.Array:
    """f1 after `steps` of the supervised contrastive loss (Khosla et al. 2020) between prompts of one task.

    Every batch holds two prompts of each of up to `PAIRS` tasks. What is compared is the hidden layer's mean over the
    edge model's layers, through a random projection that is trained too and then dropped.

    Args:
        f1: [X, H].
        rows: what f1 reads of the prompts with these numbers, [n, L, X].
        tasks_N: the task of every prompt.
        steps: of AdamW with a cosine.
        seed: of batches, projection and dropout.

    Raises:
        DataError: when no task has two prompts.
    """
    twins = [np.flatnonzero(tasks_N == task) for task in np.unique(tasks_N)]
    twins = [places for places in twins if len(places) > 1]
    if len(twins) < 2:
        raise DataError(
            "no two tasks have two prompts each among those the reader was to learn from: raise train.reader_prompts"
        )
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=0.01)
    projection = jax.random.normal(jax.random.fold_in(key, steps), (f1.shape[1], PROJECTED)) * f1.shape[1] ** -0.5
    trained = (f1, projection)
    memory = optimizer.init(trained)

    @jax.jit
    def step(trained: Any, memory: Any, x_NLX: jax.Array, labels_N: jax.Array, key: jax.Array) -> Any:
        gradients = jax.grad(contrastive_loss)(trained, x_NLX, labels_N, key)
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = optimizer.update(gradients, memory, trained)
        return optax.apply_updates(trained, updates), memory

    for number in range(steps):
        chosen = rng.choice(len(twins), size=min(PAIRS, len(twins)), replace=False)
        index = np.concatenate([rng.choice(twins[place], size=2, replace=False) for place in chosen])
        labels_N = np.repeat(chosen, 2)
        trained, memory = step(trained, memory, rows(index), labels_N, jax.random.fold_in(key, number))
    return trained[0]


def contrastive_loss(trained: tuple[jax.Array, jax.Array], x_NLX: jax.Array, labels_N: jax.Array, key: Any) -> Any:
    """-mean log of the share that a prompt's twins have in the softmax of its cosines with all others, a scalar.

    Args:
        trained: f1 [X, H] and the projection [H, D].
        x_NLX: what f1 reads of N prompts.
        labels_N: their tasks; every task twice.
        key: of the dropout on x; None for none.
    """
    f1, projection = trained
    if key is not None:
        kept = jax.random.bernoulli(key, 1 - DROPOUT, x_NLX.shape)
        x_NLX = jnp.where(kept, x_NLX / (1 - DROPOUT), 0.0)
    hidden_NH = jnp.mean(jax.nn.silu(x_NLX @ f1), axis=1)
    point_ND = (hidden_NH - jnp.mean(hidden_NH, axis=0, keepdims=True)) @ projection
    point_ND = point_ND * jax.lax.rsqrt(jnp.sum(jnp.square(point_ND), axis=1, keepdims=True) + 1e-12)
    itself_NN = jnp.eye(len(x_NLX), dtype=bool)
    cosine_NN = jnp.where(itself_NN, -jnp.inf, point_ND @ point_ND.T / TEMPERATURE)
    log_share_NN = jax.nn.log_softmax(cosine_NN, axis=1)
    twin_NN = (labels_N[:, None] == labels_N[None, :]) & ~itself_NN
    return -jnp.sum(jnp.where(twin_NN, log_share_NN, 0.0)) / jnp.sum(twin_NN.astype(jnp.float32))
