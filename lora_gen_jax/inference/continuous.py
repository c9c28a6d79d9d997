"""The programs of continuous batching: prompts join a batch that decodes, and every row has its own specialization.

In: the batch on the device (`Rows`) and prompts that join it. Out: the batch, in the same memory, and what was drawn.

All rows share one clock: the n-th step of decoding writes to cache slot n mod S, whichever rows are busy. A prompt that
joins is written to the slots just before the clock, modulo S. Visibility follows positions: nothing else has to know.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.refined import RefinedPool
from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.generator.router import Gates
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.sampling import Sampling, sample

STEPS = 4
"""Tokens that a busy row gains between two looks at who has come: more cost less, and answer later."""
STOPS = 8
"""Stop ids that a row can have."""


class Rows(struct.PyTreeNode):
    """The batch on the device; B rows, S slots.

    Attributes:
        cache: a ring; `used` is the clock modulo S.
        gates: [L, B, K], zero where a row follows the base model; None without a pool.
        newest_B: the last token drawn, not read yet.
        position_B: where it stands in its sequence; -1 for a free row.
        left_B: how many more may be drawn.
        count_B: how many were drawn.
        stop_BX: padded with -1.
        sampling: arrays [B].
        key_B: of the whole sequence; each draw derives its own.
        factors: {site: {"a": [L, B, inputs, X], "b": [L, B, X, outputs]}} beside the gates' update, zeros where a row
            has none; None in a batch without room for any.
    """

    cache: KVCache
    gates: Gates | None
    newest_B: jax.Array
    position_B: jax.Array
    left_B: jax.Array
    count_B: jax.Array
    stop_BX: jax.Array
    sampling: Sampling
    key_B: jax.Array
    factors: Any = None


class Drawn(struct.PyTreeNode):
    """Tokens of some steps, [B, N]; of row b the first `emitted_B[b]` count.

    Attributes:
        finish_B: 0 while a row goes on, 1 for a stop id, 2 for its limit.
    """

    id_BN: jax.Array
    logprob_BN: jax.Array
    emitted_B: jax.Array
    finish_B: jax.Array


class Joining(struct.PyTreeNode):
    """Prompts [R, T] that join the batch, and all that `Rows` keeps of each; rows beyond B are padding."""

    tokens_RT: Any
    positions_RT: Any
    row_R: Any
    gates: Any
    left_R: Any
    stop_RX: Any
    sampling: Sampling
    seed_R: Any
    factors: Any = None


def empty_rows(
    config: DecoderConfig,
    shape: tuple[int, int],
    dtype: jax.typing.DTypeLike,
    gates: Gates | None = None,
    factors: Any = None,
) -> Rows:
    """A batch of free rows; `shape` is (B, S), and `gates` and `factors` are those of `Rows`, all zero."""
    B, S = shape
    zeros_B = jnp.zeros(B, jnp.int32)
    return Rows(
        cache=KVCache.empty(config, B, S, dtype),
        gates=gates,
        newest_B=zeros_B,
        position_B=zeros_B - 1,
        left_B=zeros_B,
        count_B=zeros_B,
        stop_BX=jnp.full((B, STOPS), -1, jnp.int32),
        sampling=Sampling(jnp.zeros(B, float), zeros_B, jnp.ones(B, float)),
        key_B=jax.vmap(jax.random.key)(jnp.zeros(B, jnp.uint32)),
        factors=factors,
    )


def with_gates(pool: GatedPool | None, gates: Gates | None, factors: Any) -> GatedPool | RefinedPool | None:
    if pool is None or gates is None:
        return None
    gated = pool.with_gates(gates)
    return gated if factors is None else RefinedPool.of(gated, factors)


@functools.partial(jax.jit, donate_argnums=1)
def join(model: EdgeModel, rows: Rows, joining: Joining) -> tuple[Rows, Drawn]:
    """Reads prompts, draws their first tokens and puts all of it into the batch; the model's adapter is the pool."""
    j, decoder = joining, model.decoder
    R, T = j.tokens_RT.shape
    S = rows.cache.position_BS.shape[1]
    cache = KVCache.empty(decoder.config, R, T, decoder.dtype)
    model = model.replace(adapter=with_gates(model.adapter, j.gates, j.factors))
    hidden_RTD, cache = model.read(j.tokens_RT, j.positions_RT, cache=cache)
    length_R = jnp.max(j.positions_RT, axis=1) + 1
    logits_RV = model.logits(hidden_RTD[jnp.arange(R), jnp.maximum(length_R - 1, 0)])
    key_R = jax.vmap(jax.random.key)(j.seed_R)
    id_R, logprob_R = _draw(logits_RV, j.sampling, key_R, jnp.zeros(R, jnp.int32))
    finish_R = _finish(id_R, j.stop_RX, j.left_R)
    # The prompt ends just before the clock; slot S does not exist, and what is written to it is dropped.
    slot_RT = (rows.cache.used - length_R[:, None] + jnp.arange(T, dtype=jnp.int32)[None]) % S
    slot_RT = jnp.where(j.positions_RT >= 0, slot_RT, S)

    def put(old: jax.Array, new: Any) -> jax.Array:
        return old.at[j.row_R].set(new, mode="drop")

    def put_layers(old: jax.Array, new: Any) -> jax.Array:
        return old.at[:, j.row_R].set(new, mode="drop")

    kept = rows.cache
    kept = kept.replace(
        k_LBSGH=kept.k_LBSGH.at[:, j.row_R[:, None], slot_RT].set(cache.k_LBSGH, mode="drop"),
        v_LBSGH=kept.v_LBSGH.at[:, j.row_R[:, None], slot_RT].set(cache.v_LBSGH, mode="drop"),
        # What the row's last sequence has left is forgotten first.
        position_BS=put(kept.position_BS, -1).at[j.row_R[:, None], slot_RT].set(j.positions_RT, mode="drop"),
    )
    state = Rows(
        cache=kept,
        gates=jax.tree.map(put_layers, rows.gates, j.gates),
        newest_B=put(rows.newest_B, id_R),
        position_B=put(rows.position_B, jnp.where(finish_R == 0, length_R, -1)),
        left_B=put(rows.left_B, j.left_R - 1),
        count_B=put(rows.count_B, 1),
        stop_BX=put(rows.stop_BX, j.stop_RX),
        sampling=jax.tree.map(put, rows.sampling, j.sampling),
        key_B=put(rows.key_B, key_R),
        factors=jax.tree.map(put_layers, rows.factors, j.factors),
    )
    return state, Drawn(id_R[:, None], logprob_R[:, None], (finish_R != 1).astype(jnp.int32), finish_R)


@functools.partial(jax.jit, donate_argnums=1)
def decode(model: EdgeModel, rows: Rows, eager: Any) -> tuple[Rows, Drawn]:
    """Decodes until there are `STEPS` new tokens a row, all rows have ended or, if `eager`, one has."""
    B, S = rows.cache.position_BS.shape
    nothing_B = jnp.zeros(B, jnp.int32)
    drawn = Drawn(jnp.zeros((B, STEPS), jnp.int32), jnp.zeros((B, STEPS), float), nothing_B, nothing_B)
    model = model.replace(adapter=with_gates(model.adapter, rows.gates, rows.factors))

    def unfinished(carry: tuple[jax.Array, Rows, Drawn]) -> jax.Array:
        step, rows, drawn = carry
        return (step < STEPS) & jnp.any(rows.position_B >= 0) & ~(eager & jnp.any(drawn.finish_B > 0))

    def advance(carry: tuple[jax.Array, Rows, Drawn]) -> tuple[jax.Array, Rows, Drawn]:
        step, rows, drawn = carry
        busy_B = rows.position_B >= 0
        hidden_B1D, cache = model.read(rows.newest_B[:, None], rows.position_B[:, None], cache=rows.cache)
        logits_BV = model.logits(hidden_B1D[:, 0])
        id_B, logprob_B = _draw(logits_BV, _of_busy(rows.sampling, busy_B), rows.key_B, rows.count_B)
        finish_B = jnp.where(busy_B, _finish(id_B, rows.stop_BX, rows.left_B), 0)
        goes_on_B = busy_B & (finish_B == 0)
        drawn = Drawn(
            id_BN=jax.lax.dynamic_update_slice_in_dim(drawn.id_BN, id_B[:, None], step, axis=1),
            logprob_BN=jax.lax.dynamic_update_slice_in_dim(drawn.logprob_BN, logprob_B[:, None], step, axis=1),
            emitted_B=drawn.emitted_B + (busy_B & (finish_B != 1)).astype(jnp.int32),
            finish_B=drawn.finish_B + finish_B,
        )
        rows = rows.replace(
            cache=cache.replace(used=cache.used % S),
            newest_B=id_B,
            position_B=jnp.where(goes_on_B, rows.position_B + 1, -1),
            left_B=rows.left_B - 1,
            count_B=rows.count_B + 1,
        )
        return step + 1, rows, drawn

    _, rows, drawn = jax.lax.while_loop(unfinished, advance, (jnp.zeros((), jnp.int32), rows, drawn))
    return rows, drawn


@functools.partial(jax.jit, donate_argnums=0)
def release(rows: Rows, row: jax.Array) -> Rows:
    return rows.replace(position_B=rows.position_B.at[row].set(-1))


def _of_busy(sampling: Sampling, busy_B: jax.Array) -> Sampling:
    """Free rows are greedy: what they last drew with would make all rows pay for sorting."""
    off = Sampling(jnp.asarray(0.0, float), jnp.int32(0), jnp.asarray(1.0, float))
    return jax.tree.map(lambda x, y: jnp.where(busy_B, x, y), sampling, off)


def _draw(logits_BV: jax.Array, sampling: Sampling, key_B: jax.Array, count_B: jax.Array) -> tuple[Any, jax.Array]:
    """Ids and log-probabilities; the keys are those of `generate` for a prompt alone, whose row is 0."""
    fold_in = jax.vmap(jax.random.fold_in)
    id_B = sample(logits_BV, sampling, fold_in(fold_in(key_B, count_B), jnp.zeros_like(count_B)))
    chosen_B = jnp.take_along_axis(logits_BV, id_B[:, None], axis=1)[:, 0]
    return id_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=1)


def _finish(id_B: jax.Array, stop_BX: jax.Array, left_B: jax.Array) -> jax.Array:
    """0 to go on, 1 for a stop id, 2 when this was the last token allowed."""
    return jnp.where(jnp.any(id_B[:, None] == stop_BX, axis=1), 1, jnp.where(left_B <= 1, 2, 0))
