"""Soft tokens: embeddings that stand in the context in place of a prompt.

In: a prompt's ids, or its soft tokens [N, D]. Out: the soft tokens, and a `Prefix` that every query follows.

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

from lora_gen_jax.buckets import bucket, check_tokens
from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.errors import DataError
from lora_gen_jax.generator.cloud import PackedPrompts
from lora_gen_jax.inference.edge_model import EdgeModel, Prefix, require_single_prompt
from lora_gen_jax.placement import mesh_context


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
        cache = _encode(model.program, padded_1SD, positions_1S)
    if not soft_positions(c, N):
        # Among themselves they were in order; to all that follows they are there from its first position on.
        cache = cache.replace(position_BS=jnp.minimum(cache.position_BS, 0))
    return Prefix(cache=cache, length=N, positions=soft_positions(c, N))


@jax.jit
def _encode(model: EdgeModel, soft_1SD: jax.Array, positions_1S: jax.Array) -> KVCache:
    cache = KVCache.empty(model.decoder.config, 1, soft_1SD.shape[1], model.decoder.dtype)
    soft_1SD, unlearned_1S = soft_1SD.astype(model.decoder.dtype), jnp.full_like(positions_1S, -1)
    return model.read(soft_1SD, positions_1S, cache=cache, learned_BT=unlearned_1S, method="encode")[1]
