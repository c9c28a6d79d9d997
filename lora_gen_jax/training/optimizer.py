"""AdamW with warm-up and cosine decay, weight decay only on matrices.

In: a `TrainConfig`. Out: an Optax transformation and the schedule it follows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_gen_jax.config import TrainConfig


def schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of update number n = 0, 1, …: linear to the peak, cosine towards zero, never exactly zero."""
    curve = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps + 1)
    # Of an integer of 32 bits, Optax would compute the rate in float32 whatever the parameters are.
    return lambda count: curve(jnp.asarray(count, float) + 1)


def decayed(params: Any) -> Any:
    """True for the leaves that weight decay applies to: not for vectors (norms, biases) nor for embeddings."""

    def is_matrix(path: Any, leaf: jax.Array) -> bool:
        return leaf.ndim >= 2 and not any("embedding" in str(key) for key in path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm if asked for, then AdamW, with a rate of its own for the router if that is asked for."""
    adamw: Any = _adamw(config, config.learning_rate)
    if config.router_learning_rate is not None:
        rates: Any = {"router": _adamw(config, config.router_learning_rate), "rest": adamw}
        adamw = optax.multi_transform(rates, _router_or_rest)
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _adamw(config: TrainConfig, peak: float) -> optax.GradientTransformation:
    rate = schedule(dataclasses.replace(config, learning_rate=peak))
    return optax.adamw(rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decayed)


def _router_or_rest(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "router" if path[0].key == "router" else "rest", params)
