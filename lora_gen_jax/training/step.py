"""One optimiser step and one validation step.

In: the training state, the frozen weights of both models and a `Batch`. Out: the next state and metrics (scalars).
The cloud runs once per prompt and computes no logits; the edge computes logits at supervised positions alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lora_gen_jax.adapters.protocol import Adapter
from lora_gen_jax.config import Config
from lora_gen_jax.data.pipeline import Batch
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.generator.router import cv_squared, gate_entropy
from lora_gen_jax.sharding import constrain, mesh_size, whole
from lora_gen_jax.training.losses import chunked_cross_entropy

# Logits that exist at the same time on a device: 2^26 numbers are 256 MB in fp32.
LOGITS_AT_ONCE = 2**26


class TrainState(struct.PyTreeNode):
    """Everything that training changes; the frozen weights are not in it.

    Attributes:
        step: updates made, a scalar.
        params: the trainable tree, fp32.
        batch_stats: running statistics of the router's BatchNorm.
        opt_state: the optimiser's.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    generator: LoRAGen, optimizer: optax.GradientTransformation, frozen_cloud: Any, batch: Batch, seed: int
) -> TrainState:
    """A fresh state; `batch` only gives shapes."""

    def init(frozen_cloud: Any, prompts: Any) -> TrainState:
        params_key, dropout_key, gumbel_key = jax.random.split(jax.random.key(seed), 3)
        keys = {"params": params_key, "dropout": dropout_key, "gumbel": gumbel_key}
        variables = generator.init(keys, frozen_cloud, prompts)
        params = variables["params"]
        stats = variables.get("batch_stats", {})
        return whole(TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params)))

    return jax.jit(init)(frozen_cloud, batch.prompts)


def edge_loss(
    edge: Decoder, frozen_edge: Any, adapter: Adapter | None, batch: Batch, rngs: Any, packed: bool = True
) -> jax.Array:
    """Mean cross-entropy in nats over the supervised tokens; the edge sees queries alone, never the prompt.

    `packed` is the decoder's promise; a prompt that the queries of a row share (`edge_reads_prompt`) breaks it.
    """

    def logits_of(frozen: Any, hidden_PXD: jax.Array) -> Any:
        return edge.apply({"params": frozen}, hidden_PXD, method="logits")

    hidden_PTD, _ = edge.apply(
        {"params": frozen_edge},
        batch.tokens_PT,
        batch.positions_PT,
        segments_BT=batch.segments_PT,
        packed=packed,
        adapter=adapter,
        rngs=rngs,
    )
    hidden_PTD = constrain(hidden_PTD, "batch", None, None)
    hidden_PSD = jnp.take_along_axis(hidden_PTD, batch.source_PS[:, :, None], axis=1)
    rows = -(-hidden_PSD.shape[0] // mesh_size("batch"))
    chunk = max(1, LOGITS_AT_ONCE // (rows * edge.config.vocab_size // mesh_size("vocab")))
    loss_PS = chunked_cross_entropy(logits_of, frozen_edge, hidden_PSD, batch.target_PS, chunk)
    return jnp.sum(loss_PS * batch.weight_PS) / jnp.maximum(jnp.sum(batch.weight_PS), 1.0)


def objective(
    generator: LoRAGen, edge: Decoder, config: Config
) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]:
    """``f(params, batch_stats, frozen, batch, key) -> (loss + α_cv·CV², (new batch_stats, metrics))``."""

    def loss_fn(params: Any, batch_stats: Any, frozen: Any, batch: Batch, key: jax.Array):
        cloud_key, edge_key, gumbel_key = jax.random.split(key, 3)
        generated, updates = generator.apply(
            {"params": params, "batch_stats": batch_stats},
            frozen["cloud"],
            batch.prompts,
            True,
            rngs={"dropout": cloud_key, "gumbel": gumbel_key},
            mutable=["batch_stats"],
        )
        rngs = {"dropout": edge_key} if config.generator.dropout > 0 else {}
        packed = not config.data.edge_reads_prompt
        loss = edge_loss(edge, frozen["edge"], generated.adapter, batch, rngs, packed)
        metrics, total = {"loss": loss}, loss
        if generated.gates_PLE is not None:
            cv = cv_squared(generated.gates_PLE)
            total = loss + config.generator.cv_coefficient * cv
            metrics |= {"cv": cv, "gate_entropy": gate_entropy(generated.gates_PLE)}
        return total, (updates.get("batch_stats", {}), metrics)

    return loss_fn


def make_train_step(generator: LoRAGen, edge: Decoder, optimizer: optax.GradientTransformation, config: Config) -> Any:
    """Jitted ``f(state, frozen, batch) -> (state, metrics)``; the state's memory is reused."""
    loss_fn = objective(generator, edge, config)

    def step_fn(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, (batch_stats, metrics)), gradients = grad_fn(state.params, state.batch_stats, frozen, batch, key)
        # Left to itself the compiler hands parts of the state on in pieces, and the next step is another program.
        gradients = whole(gradients)
        # Optax mixes Python and array scalars in ways that strict promotion rejects.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(gradients), "answer_tokens": jnp.sum(batch.weight_PS)}
        return whole(TrainState(state.step + 1, params, batch_stats, opt_state)), metrics

    return jax.jit(step_fn, donate_argnums=0)


def make_validation_step(generator: LoRAGen, edge: Decoder, config: Config) -> Any:
    """Jitted ``f(variables, frozen, batch) -> loss``; running statistics, no dropout; without variables the base."""

    def step_fn(variables: Any, frozen: Any, batch: Batch) -> jax.Array:
        adapter = None
        if variables is not None:
            generated: Any = generator.apply(variables, frozen["cloud"], batch.prompts)
            adapter = generated.adapter
        return edge_loss(edge, frozen["edge"], adapter, batch, {}, not config.data.edge_reads_prompt)

    return jax.jit(step_fn)
