"""Tokens that many sequences begin with, read once: their keys and values serve every row of a batch.

In: the ids of a few-shot block (or keys and values made otherwise, of a soft prompt for example).
Out: a `Prefix`, which every row of a batch reads without a copy of its own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax.buckets import bucket, check_tokens, pad_rows
from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.errors import DataError
from lora_gen_jax.inference.edge_model import EdgeModel, Prefix, require_single_prompt


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
