"""Tokens that many sequences begin with, read once: their keys and values serve every row of a batch.

In: the ids of a few-shot block, or soft tokens: embeddings [N, D] that stand in the context in place of a prompt.
Out: a `Prefix`, which every row of a batch reads without a copy of its own.

As the published AutoCompressors have it, soft tokens have positions like any others where positions are rotations
(Llama). Where a position is a learned embedding (OPT) they get none: the tokens behind them are numbered from 0, and
the model's table has all of its rows for those.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax.buckets import bucket, check_tokens, pad_rows
from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.errors import DataError
from lora_gen_jax.generator.cloud import PackedPrompts
from lora_gen_jax.inference.edge_model import EdgeModel, Prefix, require_single_prompt
from lora_gen_jax.placement import mesh_context


def encode_prefix(model: EdgeModel, ids: Sequence[int]) -> Prefix:
    """Reads a prefix.

    Args:
        model: that the rest will be read with; its own prefix does not matter.
        ids: at least one token id.

    Raises:
        DataError: when `ids` is empty, too long for the model or foreign to its vocabulary, or when the adapter
            holds several prompts.
    """
    if not ids:
        raise DataError("the prefix is empty", field="prefix", code="empty", remedy="leave it out")
    limit = model.decoder.config.max_positions
    if len(ids) >= limit:
        raise DataError(
            f"the prefix has {len(ids)} tokens, the model reads {limit} in all",
            field="prefix",
            code="too long",
            remedy="use fewer shots",
        )
    check_tokens(ids, model.decoder.config.vocab_size, "prefix")
    require_single_prompt(model.adapter)
    cache = _encode(model.replace(prefix=None).elsewhere.program, pad_rows([ids], bucket(len(ids)), 1))
    return Prefix(cache=cache, length=len(ids), ids=tuple(ids))


@jax.jit
def _encode(model: EdgeModel, batch: tuple[np.ndarray, np.ndarray]) -> KVCache:
    tokens_BT, positions_BT = batch
    cache = KVCache.empty(model.decoder.config, 1, tokens_BT.shape[1], model.decoder.dtype)
    return model.read(tokens_BT, positions_BT, cache=cache)[1]


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The same cache with more slots, `slots` in all."""
    more = slots - cache.position_BS.shape[1]
    pad = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
    return cache.replace(
        k_LBSGH=jnp.pad(cache.k_LBSGH, pad),
        v_LBSGH=jnp.pad(cache.v_LBSGH, pad),
        position_BS=jnp.pad(cache.position_BS, ((0, 0), (0, more)), constant_values=-1),
    )


def past_prefix(positions_BT: np.ndarray, length: int) -> np.ndarray:
    """Positions that go on after a prefix which takes `length` of them; padding stays padding."""
    return np.where(positions_BT < 0, np.int32(-1), positions_BT + np.int32(length))


def check_length(tokens: int, config: DecoderConfig, remedy: str) -> None:
    """A sequence must fit the model.

    Raises:
        DataError: when it has more tokens than the model has positions; the message ends with the remedy.
    """
    if tokens > config.max_positions:
        raise DataError(
            f"{tokens} tokens do not fit the model's {config.max_positions} positions", field="tokens", remedy=remedy
        )


def soft_positions(config: DecoderConfig, tokens: int) -> int:
    """Positions that so many soft tokens take."""
    return 0 if config.learned_positions else tokens


def compress(module: Any, variables: Any, params: Any, ids: Sequence[int]) -> jax.Array:
    """Soft tokens [N, D] of a prompt, in fp32. The prompt's length is bucketed, so that few programs are compiled.

    Args:
        module: an `AutoCompressor`.
        variables: its own.
        params: the edge model's weights.
        ids: the prompt in the edge model's ids.

    Raises:
        DataError: for an empty prompt, one too long for the model, or a token id that the model lacks.
    """
    if not ids:
        raise DataError("the prompt is empty: there is nothing to compress", field="prompt", code="empty")
    check_tokens(ids, module.edge.vocab_size, "prompt")
    needed, limit = module.positions(len(ids)), module.edge.max_positions
    if needed > limit:
        raise DataError(
            f"a prompt of {len(ids)} tokens needs {needed} positions to be compressed, the edge model has {limit}",
            field="prompt",
            code="too long",
            remedy="shorten it, or give fewer shots",
        )
    edge_1X = np.full((1, bucket(len(ids))), -1, np.int32)
    edge_1X[0, : len(ids)] = ids
    with mesh_context(params):
        return _compress(module, variables, params, edge_1X)


@functools.partial(jax.jit, static_argnums=0)
def _compress(module: Any, variables: Any, params: Any, edge_1X: jax.Array) -> jax.Array:
    prompts = PackedPrompts(None, None, None, None, None, edge_PX=edge_1X)
    return module.apply(variables, params, prompts).soft_PND[0]


def encode_soft(model: EdgeModel, soft_ND: jax.Array) -> Prefix:
    """Reads soft tokens, each after those before it.

    Args:
        model: that the rest will be read with.
        soft_ND: the soft tokens, at least one; they enter as they are, without the scale of token embeddings.

    Raises:
        DataError: when there is no soft token or more than the model has positions, when they are of another width than
            the model's, or when the adapter holds several prompts.
    """
    (N, D), c = soft_ND.shape, model.decoder.config
    if D != c.width:
        raise DataError(
            f"soft tokens of width {D} do not fit a model of width {c.width}",
            field="soft_ND",
            code="width",
            remedy="compress with this model",
        )
    if N == 0:
        raise DataError("there are no soft tokens", field="soft_ND", code="empty", remedy="leave the prefix out")
    if soft_positions(c, N) >= c.max_positions:
        raise DataError(
            f"{N} soft tokens leave no room, the model reads {c.max_positions} in all",
            field="soft_ND",
            code="too long",
            remedy="use fewer",
        )
    require_single_prompt(model.adapter)
    padded_1SD = jnp.pad(soft_ND, ((0, bucket(N) - N), (0, 0)))[None]
    positions_1S = np.arange(padded_1SD.shape[1], dtype=np.int32)[None]
    positions_1S = np.where(positions_1S < N, positions_1S, np.int32(-1))
    with mesh_context(model.params):
        cache = _encode_soft(model.program, padded_1SD, positions_1S)
    if not soft_positions(c, N):
        # Among themselves they were in order; to all that follows they are there from its first position on.
        cache = cache.replace(position_BS=jnp.minimum(cache.position_BS, 0))
    return Prefix(cache=cache, length=N, positions=soft_positions(c, N))


@jax.jit
def _encode_soft(model: EdgeModel, soft_1SD: jax.Array, positions_1S: jax.Array) -> KVCache:
    cache = KVCache.empty(model.decoder.config, 1, soft_1SD.shape[1], model.decoder.dtype)
    soft_1SD, unlearned_1S = soft_1SD.astype(model.decoder.dtype), jnp.full_like(positions_1S, -1)
    return model.read(soft_1SD, positions_1S, cache=cache, learned_BT=unlearned_1S, method="encode")[1]
