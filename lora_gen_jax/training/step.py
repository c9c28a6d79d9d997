"""One optimizer step and one validation step.

In: the training state, the frozen weights of both models and a `Batch`. Out: the next state and metrics (scalars).
The cloud runs once per prompt and computes no logits; the edge computes logits only at supervised positions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lora_gen_jax.adapters.protocol import Adapter
from lora_gen_jax.config import Config
from lora_gen_jax.data.pipeline import Batch, EdgeRows
from lora_gen_jax.decoder.layers import RECORDS, records_of
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.generator.trained_module import Generated, TrainedModule
from lora_gen_jax.sharding import constrain, replicate
from lora_gen_jax.training.inner import refined
from lora_gen_jax.training.losses import mean_cross_entropy


class TrainState(struct.PyTreeNode):
    """Everything that training changes; the frozen weights are not in it.

    Attributes:
        step: updates made, a scalar.
        params: the trainable tree, fp32.
        batch_stats: running statistics of the router's BatchNorm.
        opt_state: the optimizer's.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    generator: TrainedModule, optimizer: optax.GradientTransformation, frozen: Any, batch: Batch, seed: int
) -> TrainState:
    """A fresh state; of `batch`, only the shapes count."""

    def init(frozen_reader: Any, prompts: Any) -> TrainState:
        params_key, dropout_key, gumbel_key = jax.random.split(jax.random.key(seed), 3)
        keys = {"params": params_key, "dropout": dropout_key, "gumbel": gumbel_key}
        variables = generator.init(keys, frozen_reader, prompts)
        params = variables["params"]
        stats = variables.get("batch_stats", {})
        return replicate(TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params)))

    return jax.jit(init)(reader_weights(generator, frozen), batch.prompts)


def reader_weights(generator: TrainedModule, frozen: Any) -> Any:
    """The weights of the frozen model that reads the prompts; None where none does."""
    return None if generator.reader is None else frozen[generator.reader]


def edge_loss(
    edge: Decoder, frozen_edge: Any, adapter: Adapter | None, batch: EdgeRows, rngs: Any, packed: bool = True
) -> jax.Array:
    """Mean cross-entropy in nats over the supervised tokens; the edge sees only queries, never the prompt.

    `packed` is the decoder's promise; a prompt that the queries of a row share (`edge_reads_prompt`) breaks it.
    """
    return edge_pass(edge, frozen_edge, Generated(adapter), batch, rngs, packed)[0]


def edge_pass(
    edge: Decoder, frozen_edge: Any, generated: Generated, batch: EdgeRows, rngs: Any, packed: bool = True
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`edge_loss` of what a method generated, soft tokens included, and what its adapter recorded, by site."""
    hidden_PTD, records = hidden_states(edge, frozen_edge, generated, batch, rngs, packed)
    hidden_PTD = constrain(hidden_PTD, "batch", None, None)
    hidden_PSD = jnp.take_along_axis(hidden_PTD, batch.source_PS[:, :, None], axis=1)
    loss = mean_cross_entropy(edge, frozen_edge, hidden_PSD, batch.target_PS, batch.weight_PS)
    return loss, records


def hidden_states(
    edge: Decoder, frozen_edge: Any, generated: Generated, batch: EdgeRows, rngs: Any, packed: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The edge's final hidden states [P, T, D] at the batch's tokens, and {site: [L, P, T, X]} of records.

    Soft tokens stand before a row, as a segment 0 that all its queries see. Where positions are learned they get none,
    and queries are numbered as if they were not there (`inference/prefix.py`).
    """
    variables, soft_PND = {"params": frozen_edge}, generated.soft_PND
    positions_PT, segments_PT, before, learned_PT = batch.positions_PT, batch.segments_PT, 0, None
    x_PTD: Any = edge.apply(variables, batch.tokens_PT, method="embed")
    if soft_PND is not None:
        P, before, _ = soft_PND.shape
        x_PTD = jnp.concatenate([soft_PND.astype(x_PTD.dtype), x_PTD], axis=1)
        first_PN = jnp.broadcast_to(jnp.arange(before, dtype=jnp.int32)[None], (P, before))
        learned_PT = jnp.concatenate([jnp.full_like(first_PN, -1), positions_PT], axis=1)
        behind_PT = jnp.where(positions_PT < 0, positions_PT, positions_PT + before)
        positions_PT = jnp.concatenate([first_PN, behind_PT], axis=1)
        segments_PT = jnp.concatenate([jnp.zeros_like(first_PN), segments_PT], axis=1)
    (hidden_PXD, _), collections = edge.apply(
        variables,
        x_PTD,
        positions_PT,
        segments_BT=segments_PT,
        packed=packed and soft_PND is None,
        adapter=generated.adapter,
        learned_BT=learned_PT,
        rngs=rngs,
        mutable=[RECORDS],
        method="encode",
    )
    return hidden_PXD[:, before:], {site: x[:, :, before:] for site, x in records_of(collections).items()}


def objective(
    generator: TrainedModule, edge: Decoder, config: Config
) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]:
    """``f(params, batch_stats, frozen, batch, key) -> (loss + the method's own, (new batch_stats, metrics))``.

    `inner`, a scalar, says whether this step has inner ones (`TrainConfig.inner_steps`).
    """

    def loss_fn(params: Any, batch_stats: Any, frozen: Any, batch: Batch, key: jax.Array, inner: Any = True):
        cloud_key, edge_key, gumbel_key = jax.random.split(key, 3)
        generated, updates = generator.apply(
            {"params": params, "batch_stats": batch_stats},
            reader_weights(generator, frozen),
            batch.prompts,
            True,
            rngs={"dropout": cloud_key, "gumbel": gumbel_key},
            mutable=["batch_stats"],
        )
        if batch.shots is not None and generated.logits_PLE is not None:
            shots = batch.shots

            def shot_loss(adapter: Any) -> jax.Array:
                return edge_loss(edge, frozen["edge"], adapter, shots, {})

            inner_key = jax.random.fold_in(key, 3)
            generated = refined(generated, shot_loss, config.generator, config.train, inner_key, inner)
        rngs = {"dropout": edge_key} if config.generator.dropout > 0 else {}
        packed = not config.data.edge_reads_prompt
        loss, records = edge_pass(edge, frozen["edge"], generated, batch, rngs, packed)
        more, metrics = generator.auxiliary(generated, records, batch)
        return loss + more, (updates.get("batch_stats", {}), {"loss": loss, **metrics})

    return loss_fn


def make_train_step(
    generator: TrainedModule, edge: Decoder, optimizer: optax.GradientTransformation, config: Config
) -> Any:
    """Jitted ``f(state, frozen, batch) -> (state, metrics)``; the state's memory is reused."""
    loss_fn = objective(generator, edge, config)

    def step_fn(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        inner = state.step >= config.train.inner_after
        (_, (batch_stats, metrics)), gradients = grad_fn(state.params, state.batch_stats, frozen, batch, key, inner)
        # Without this the compiler may return parts of the state sharded, and the next step would compile again.
        gradients = replicate(gradients)
        # Optax mixes Python and array scalars in ways that strict promotion rejects.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(gradients), "answer_tokens": jnp.sum(batch.weight_PS)}
        return replicate(TrainState(state.step + 1, params, batch_stats, opt_state)), metrics

    return jax.jit(step_fn, donate_argnums=0)


def make_validation_step(generator: TrainedModule, edge: Decoder, config: Config) -> Any:
    """Jitted ``f(variables, frozen, batch) -> loss``; running statistics, no dropout; without variables the base."""

    def step_fn(variables: Any, frozen: Any, batch: Batch) -> jax.Array:
        generated: Any = Generated(None)
        if variables is not None:
            generated = generator.apply(variables, reader_weights(generator, frozen), batch.prompts)
        return edge_pass(edge, frozen["edge"], generated, batch, {}, not config.data.edge_reads_prompt)[0]

    return jax.jit(step_fn)
