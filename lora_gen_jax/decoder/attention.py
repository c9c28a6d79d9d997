"""Who sees whom, the key/value cache, and attention itself.

In: a position per token (-1 for padding) and, where several sequences share a row, a segment per token.
Out: boolean masks [B, T, S] and attention outputs. Because visibility follows positions and not slots,
left-padded, right-padded and packed rows need no case of their own.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_gen_jax.decoder.product import product

# Of queries, where a slot sees none after it: more and smaller ones save less than they cost.
LEAST_BLOCK, MOST_BLOCKS = 128, 8


class KVCache(struct.PyTreeNode):
    """Keys and values of the tokens read so far.

    Attributes:
        k_LBSGH, v_LBSGH: keys and values; S slots, of which the first `used` are filled.
        position_BS: each slot's position in its own row, -1 for padding and empty slots.
        used: number of filled slots, a scalar; the same for all rows.
    """

    k_LBSGH: jax.Array
    v_LBSGH: jax.Array
    position_BS: jax.Array
    used: jax.Array

    @classmethod
    def empty(cls, config: Any, rows: int, slots: int, dtype: jax.typing.DTypeLike) -> "KVCache":
        """A cache of B `rows` and S `slots` for a model of this `DecoderConfig`."""
        shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
        return cls(
            k_LBSGH=jnp.zeros(shape, dtype),
            v_LBSGH=jnp.zeros(shape, dtype),
            position_BS=jnp.full((rows, slots), -1, jnp.int32),
            used=jnp.zeros((), jnp.int32),
        )

    def advance(self, position_BT: jax.Array) -> "KVCache":
        """Claims the next T slots for tokens at these positions; their keys and values come per layer."""
        position_BS = jax.lax.dynamic_update_slice_in_dim(self.position_BS, position_BT, self.used, axis=1)
        return self.replace(position_BS=position_BS, used=self.used + position_BT.shape[1])

    def segments(self, newest_BT: jax.Array) -> jax.Array:
        """Segments of all slots [B, S] from those of the T tokens added last; all earlier tokens are segment 0."""
        start = self.used - newest_BT.shape[1]
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(self.position_BS), newest_BT, start, axis=1)


def visible(query_BT: jax.Array, key_BS: jax.Array, segments: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
    """Boolean [B, T, S]: key s is no later than query t, is not padding, and is in its segment.

    Segment 0 is a prefix that all segments of the row see: the options of a question score in one row, each
    seeing the question and itself.
    """
    mask = (key_BS[:, None, :] <= query_BT[:, :, None]) & (key_BS[:, None, :] >= 0)
    if segments is not None:
        query_segment, key_segment = segments[0][:, :, None], segments[1][:, None, :]
        mask &= (query_segment == key_segment) | (key_segment == 0)
    return mask


def last_of_context(positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Boolean [B, T]: the token stands last among those of its row that all its segments see."""
    own_BT = positions_BT if segments_BT is None else jnp.where(segments_BT == 0, positions_BT, -1)
    return (own_BT >= 0) & (own_BT == jnp.max(own_BT, axis=1, keepdims=True))


def within_window(query_BT: jax.Array, key_BS: jax.Array, window: int) -> jax.Array:
    """Boolean [B, T, S]: key s is among the last `window` positions up to query t."""
    return query_BT[:, :, None] - key_BS[:, None, :] < window


def attend(
    q_BTNH: jax.Array,
    parts: Sequence[tuple[jax.Array, jax.Array]],
    mask_BTS: jax.Array,
    config: Any,
    kernel: str = "auto",
    operands: Any = None,
    ordered: bool = False,
) -> jax.Array:
    """Softmax attention with grouped heads, [B, T, N, H]; the softmax is in fp32.

    Args:
        q_BTNH: queries.
        parts: keys and values, each pair [B, S_i, G, H], or [1, S_i, G, H] for keys that all rows share (a prefix);
            G divides N.
        mask_BTS: True where attention is allowed, over the slots of all parts. Rows without any True (padding) give a
            finite, unused result.
        config: supplies `attention_scale` and `attention_softcap`.
        kernel: grouped (`_grouped_attention`), or `jax.nn.dot_product_attention` as xla, or as cudnn through the GPU's
            flash kernel; auto is grouped on a CPU and xla elsewhere. What the library's function lacks is grouped.
        operands: what the two products round their operands to, where they are grouped (`product`).
        ordered: a promise that no slot sees a later one, and that queries and keys are of the same slots.
    """
    if kernel == "auto":
        kernel = "grouped" if jax.default_backend() == "cpu" else "xla"
    if config.attention_softcap is not None or len(parts) > 1 or kernel == "grouped":
        if ordered and len(parts) == 1:
            return _by_blocks(q_BTNH, *parts[0], mask_BTS, config, operands)
        return _grouped_attention(q_BTNH, parts, mask_BTS, config, operands)
    ((k_BSGH, v_BSGH),) = parts
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSGH,
        v_BSGH,
        mask=mask_BTS[:, None],
        scale=config.attention_scale,
        implementation="cudnn" if kernel == "cudnn" else "xla",
    )


def _by_blocks(
    q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array, mask_BTS: jax.Array, config: Any, operands: Any
) -> jax.Array:
    """`_grouped_attention` in blocks of queries, each with the keys up to its end: the later ones are masked anyway."""
    T = q_BTNH.shape[1]
    count = max(1, min(T // LEAST_BLOCK, MOST_BLOCKS))
    ends = [T * i // count for i in range(count + 1)]
    blocks = [
        _grouped_attention(
            q_BTNH[:, start:end], [(k_BTGH[:, :end], v_BTGH[:, :end])], mask_BTS[:, start:end, :end], config, operands
        )
        for start, end in itertools.pairwise(ends)
    ]
    return jnp.concatenate(blocks, axis=1)


def _grouped_attention(
    q_BTNH: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array]], mask_BTS: jax.Array, config: Any, operands: Any
) -> jax.Array:
    """For what the library's function lacks: a soft-cap, c·tanh(score / c), keys that rows share, a CPU at full speed.

    One large matmul for all query heads of a group, and the sum of the softmax divided out after mixing, which is
    two to three times as fast on a CPU as the library's. Keys that all rows share are never repeated: their matmul
    has the rows of the batch below each other.
    """
    B, T, N, H = q_BTNH.shape
    G = parts[0][0].shape[2]
    scale = jnp.asarray(config.attention_scale, q_BTNH.dtype)
    q_GBXH = (q_BTNH * scale).reshape(B, T, G, N // G, H).transpose(2, 0, 3, 1, 4).reshape(G, B, -1, H)
    bias_BTS = jnp.where(mask_BTS, 0.0, jnp.finfo(jnp.float32).min / 2)
    scores, start = [], 0
    for k_BSGH, _ in parts:
        S = k_BSGH.shape[1]
        score = _matmul_rows(q_GBXH, k_BSGH.transpose(2, 0, 3, 1), operands)
        if (cap := config.attention_softcap) is not None:
            score = cap * jnp.tanh(score / cap)
        bias = bias_BTS[None, :, None, :, start : start + S]
        scores.append((score.reshape(G, B, N // G, T, S) + bias).reshape(G, B, -1, S))
        start += S
    # The largest score only keeps exp in range; the result does not depend on it.
    largest = functools.reduce(jnp.maximum, [jnp.max(score, axis=-1, keepdims=True) for score in scores])
    weights = [jnp.exp(score - jax.lax.stop_gradient(largest)) for score in scores]
    total = functools.reduce(jnp.add, [jnp.sum(weight, axis=-1, keepdims=True) for weight in weights])
    mixed = functools.reduce(
        jnp.add,
        [
            _matmul_rows(weight.astype(v_BSGH.dtype), v_BSGH.transpose(2, 0, 1, 3), operands)
            for weight, (_, v_BSGH) in zip(weights, parts, strict=True)
        ],
    )
    y_GBMTH = (mixed / total).reshape(G, B, N // G, T, H)
    return y_GBMTH.transpose(1, 3, 0, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _matmul_rows(x_GBXY: jax.Array, y_GBYZ: jax.Array, operands: Any) -> jax.Array:
    """[G, B, X, Z] in fp32; where y has one row for all of x's, these are one matmul."""
    G, B, X, Y = x_GBXY.shape
    if y_GBYZ.shape[1] != B:
        x_GBXY = x_GBXY.reshape(G, 1, B * X, Y)
    if operands is None:
        z_GBXZ = jnp.matmul(x_GBXY, y_GBYZ, preferred_element_type=float)
    else:
        z_GBXZ = product(x_GBXY, y_GBYZ, operands)
    return z_GBXZ.reshape(G, B, X, -1)
