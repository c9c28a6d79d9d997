"""Tokens that many sequences begin with, read once: their keys and values serve every row of a batch.

In: the ids of a few-shot block (or keys and values made otherwise, of a soft prompt for example).
Out: a `Prefix`, which every row of a batch reads without a copy of its own.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_gen_jax.adapters.protocol import Adapter
from lora_gen_jax.buckets import bucket, check_tokens, pad_rows
from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import DataError
from lora_gen_jax.inference.forward import forward_only
from lora_gen_jax.inference.mixed import require_single_prompt


class Prefix(struct.PyTreeNode):
    """What the rows of a batch begin with.

    Attributes:
        cache: keys and values of one row; slots at position -1 are padding.
        length: tokens.
        ids: the token ids; empty for a soft prompt, which has none.
        positions: that the tokens take, so that the sequences go on at this one; left out, one a token.
    """

    cache: KVCache
    length: int = struct.field(pytree_node=False)
    ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    positions: int | None = struct.field(pytree_node=False, default=None)


def encode_prefix(decoder: Decoder, params: Any, ids: Sequence[int], adapter: Adapter | None = None) -> Prefix:
    """Reads a prefix.

    Args:
        decoder, params: the model.
        ids: at least one token id.
        adapter: of a single prompt, the one that the rest will be read with.

    Raises:
        DataError: when `ids` is empty, too long for the model or foreign to its vocabulary, or when the adapter
            holds several prompts.
    """
    if not ids:
        raise DataError("the prefix is empty", field="prefix", code="empty", remedy="leave it out")
    limit = decoder.config.max_positions
    if len(ids) >= limit:
        raise DataError(
            f"the prefix has {len(ids)} tokens, the model reads {limit} in all",
            field="prefix",
            code="too long",
            remedy="use fewer shots",
        )
    check_tokens(ids, decoder.config.vocab_size, "prefix")
    require_single_prompt(adapter)
    adapter = None if adapter is None else adapter.elsewhere
    cache = _encode(forward_only(decoder), params, pad_rows([ids], bucket(len(ids)), 1), adapter)
    return Prefix(cache=cache, length=len(ids), ids=tuple(ids))


@functools.partial(jax.jit, static_argnums=0)
def _encode(decoder: Decoder, params: Any, batch: tuple[np.ndarray, np.ndarray], adapter: Any) -> KVCache:
    tokens_BT, positions_BT = batch
    cache = KVCache.empty(decoder.config, 1, tokens_BT.shape[1], decoder.dtype)
    _, cache = decoder.apply({"params": params}, tokens_BT, positions_BT, adapter=adapter, cache=cache)
    assert isinstance(cache, KVCache)
    return cache


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The same cache with more slots, `slots` in all."""
    more = slots - cache.position_BS.shape[1]
    pad = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
    return cache.replace(
        k_LBSGH=jnp.pad(cache.k_LBSGH, pad),
        v_LBSGH=jnp.pad(cache.v_LBSGH, pad),
        position_BS=jnp.pad(cache.position_BS, ((0, 0), (0, more)), constant_values=-1),
    )


def taken_positions(prefix: Prefix | None) -> int:
    """Positions that a prefix takes; 0 without one."""
    if prefix is None:
        return 0
    return prefix.length if prefix.positions is None else prefix.positions


def prefix_cache(prefix: Prefix | None) -> KVCache | None:
    """Keys and values of a prefix; None without one."""
    return None if prefix is None else prefix.cache


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
