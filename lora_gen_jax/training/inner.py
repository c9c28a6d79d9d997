"""Training for refining: gates take a few steps on a prompt's own shots before its queries are answered with them.

In: what the generator said about P prompts, and the loss of an adapter on their shots. Out: the same with the gates
after those steps, whose loss on the queries trains pool and router. Gradients do not pass through the steps:
first-order MAML (Finn et al., 2017, arXiv:1703.03400).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_gen_jax.config import GeneratorConfig, TrainConfig
from lora_gen_jax.generator.router import gates_of, straight_through
from lora_gen_jax.generator.trained_module import Generated

SOFT = 0.2
"""A gradient's entries far below this share of their row's root mean square move by less than a full step."""


def refined(
    generated: Generated,
    shot_loss: Callable[[Any], jax.Array],
    settings: GeneratorConfig,
    train: TrainConfig,
    key: jax.Array,
    active: Any = True,
) -> Generated:
    """`generated` with the gates of logits that took `inner_steps` steps; a prompt without shots keeps its own.

    A share `inner_swapped` of the prompts begins with the logits of the batch's next prompt. What is read about a new
    task is partly wrong, and so the pool learns to make up for it; those prompts teach the router nothing.

    Args:
        generated: of P prompts, with the router's logits.
        shot_loss: an adapter of P prompts -> its loss on their shots, a scalar.
        settings, train: of the run.
        key: draws who begins with another prompt's logits.
        active: False leaves `generated` as it is.
    """
    routing = settings.routing, settings.top_k, settings.temperature
    logits_PLE, pool = generated.logits_PLE, jax.lax.stop_gradient(generated.adapter)

    def loss(values_PLE: jax.Array) -> jax.Array:
        return shot_loss(pool.with_gates(straight_through(values_PLE, *routing).by_layer()))

    def steps(values_PLE: jax.Array) -> jax.Array:
        for _ in range(train.inner_steps):
            values_PLE = values_PLE - train.inner_rate * softened_sign(jax.grad(loss)(values_PLE))
        return values_PLE

    swapped_P = jax.random.bernoulli(key, train.inner_swapped, logits_PLE.shape[:1]) & jnp.asarray(active)
    swapped_P11 = swapped_P[:, None, None]
    start_PLE = jax.lax.stop_gradient(jnp.where(swapped_P11, jnp.roll(logits_PLE, 1, axis=0), logits_PLE))
    end_PLE = jax.lax.stop_gradient(jax.lax.cond(active, steps, lambda values_PLE: values_PLE, start_PLE))
    logits_PLE = jnp.where(swapped_P11, start_PLE, logits_PLE) + (end_PLE - start_PLE)
    # Gates that were read may have Gumbel noise, of which logits know nothing.
    moved = gates_of(logits_PLE, *routing)
    gates = jax.tree.map(lambda new, read: jnp.where(active, new, read), moved, generated.gates)
    adapter = generated.adapter.with_gates(gates.by_layer())
    return generated.replace(adapter=adapter, gates=gates, logits_PLE=logits_PLE)


def softened_sign(gradient_PLE: jax.Array) -> jax.Array:
    """g / (|g| + SOFT · RMS of the row), in (-1, 1): whatever the size of the loss, a step has the same size."""
    rms_PL1 = jnp.sqrt(jnp.mean(jnp.square(gradient_PLE), axis=-1, keepdims=True))
    return gradient_PLE / (jnp.abs(gradient_PLE) + SOFT * rms_PL1 + jnp.finfo(gradient_PLE.dtype).tiny)
