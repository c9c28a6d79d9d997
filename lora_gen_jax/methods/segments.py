"""Prompts cut into segments, as an AutoCompressor reads them.

In: P prompts in ids, padded with -1 at the end. Out: segments of fixed shapes, which cover every token exactly once,
and the rows [soft tokens; segment; summary tokens] that the model reads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A segment has this many tokens before any has more.
FEWEST = 2
# In training a segment's share of the rest is drawn between these, in 64ths: 0.5 to 1.5 of the average.
SMALLEST, LARGEST = 32, 96


class Segment(NamedTuple):
    """The same segment of P prompts, S slots each.

    Attributes:
        tokens_PS: ids; any behind the segment's end.
        length_P: how many of them are of the segment.
        next_PS: the token that follows each in the prompt.
        weight_PS: 1 where a token of the segment has such a successor, else 0.
    """

    tokens_PS: jax.Array
    length_P: jax.Array
    next_PS: jax.Array
    weight_PS: jax.Array


def random_shares(key: jax.Array, prompts: int, segments: int) -> jax.Array:
    """Shares of M segments for `segment_lengths`, [P, M]."""
    return jax.random.randint(key, (prompts, segments), SMALLEST, LARGEST + 1, jnp.int32)


def segment_lengths(tokens_P: jax.Array, shares_PM: jax.Array) -> jax.Array:
    """How P prompts of so many tokens are cut into M segments, [P, M] int32, each row summing to its tokens.

    Every segment has two tokens where the prompt has enough, earlier segments first where it has not; what is left is
    divided in proportion to `shares_PM` (positive integers, so that the sums are exact).
    """
    M = shares_PM.shape[1]
    least_PM = jnp.clip(tokens_P[:, None] - FEWEST * jnp.arange(M, dtype=jnp.int32)[None], 0, FEWEST)
    rest_P = jnp.maximum(tokens_P - FEWEST * M, 0)
    ends_PM = rest_P[:, None] * jnp.cumsum(shares_PM, axis=1) // jnp.sum(shares_PM, axis=1, keepdims=True)
    return least_PM + jnp.diff(ends_PM, axis=1, prepend=0)


def longest_segment(tokens: int, segments: int, even: bool) -> int:
    """The most tokens that `segment_lengths` can give one segment.

    Args:
        tokens: at most so many has the prompt.
        segments: M.
        even: all shares are the same; else they are random ones.
    """
    smallest, largest = (1, 1) if even else (SMALLEST, LARGEST)
    rest = max(tokens - FEWEST * segments, 0)
    return min(tokens, FEWEST) - (-rest * largest // (largest + smallest * (segments - 1)))


def take_segment(edge_PX: jax.Array, start_P: jax.Array, length_P: jax.Array, slots: int) -> Segment:
    """The tokens from `start_P` on, `length_P` of them, in S = `slots` slots."""
    offset_1S = jnp.arange(slots, dtype=jnp.int32)[None]
    at_PS = start_P[:, None] + offset_1S
    padded_PX = jnp.pad(edge_PX, ((0, 0), (0, 1)), constant_values=-1)

    def ids(at_PS: jax.Array) -> jax.Array:
        return jnp.take_along_axis(padded_PX, jnp.minimum(at_PS, edge_PX.shape[1]), axis=1)

    next_PS = ids(at_PS + 1)
    weight_PS = (offset_1S < length_P[:, None]) & (next_PS >= 0)
    return Segment(jnp.maximum(ids(at_PS), 0), length_P, jnp.maximum(next_PS, 0), weight_PS.astype(float))


def join(
    soft_PND: jax.Array, segment_PSD: jax.Array, length_P: jax.Array, summary_KD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[soft tokens; segment; summary tokens]: embeddings in the type of `segment_PSD`, positions, learned positions.

    A short segment's unused slots are padding, at position -1; its summary tokens follow its last token. Learned
    positions begin anew with each segment, and -1 says that soft and summary tokens have none.
    """
    (P, N, _), S, K = soft_PND.shape, segment_PSD.shape[1], summary_KD.shape[0]
    summary_PKD = jnp.broadcast_to(summary_KD[None], (P, *summary_KD.shape))
    parts = [soft_PND.astype(segment_PSD.dtype), segment_PSD, summary_PKD.astype(segment_PSD.dtype)]
    before_PN = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32)[None], (P, N))
    offset_1S = jnp.arange(S, dtype=jnp.int32)[None]
    own_PS = jnp.where(offset_1S < length_P[:, None], N + offset_1S, -1)
    behind_PK = N + length_P[:, None] + jnp.arange(K, dtype=jnp.int32)[None]
    positions_PT = jnp.concatenate([before_PN, own_PS, behind_PK], axis=1)
    bare_PN, bare_PK = jnp.full_like(before_PN, -1), jnp.full_like(behind_PK, -1)
    learned_PT = jnp.concatenate([bare_PN, jnp.maximum(own_PS - N, -1), bare_PK], axis=1)
    return jnp.concatenate(parts, axis=1), positions_PT, learned_PT
