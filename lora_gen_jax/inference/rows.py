"""Scoring requests laid out in rows: a context once, followed by all its continuations.

In: requests (context ids, continuations). Out: `Row`s, and batches of them as padded arrays. In a row the context
is segment 0, which all segments see; continuation k is segment k + 1 and its positions go on after the context.
A continuation's last token is predicted but never read, so it is not in the row.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import struct

from lora_gen_jax.buckets import bucket, check_tokens, power_of_two
from lora_gen_jax.errors import DataError


class Request(NamedTuple):
    """What is to be scored: log p(continuation | context) for each continuation.

    Attributes:
        context: at least one token id; the bos or eos id where there is no context.
        continuations: one or more lists of at least one token id.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Row(NamedTuple):
    """A context with some of its continuations.

    Attributes:
        request: index of the request.
        first: index of the first continuation here; the others follow.
        context, continuations: token ids.
    """

    request: int
    first: int
    context: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def length(self) -> int:
        """Tokens that the row reads."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


class RowBatch(struct.PyTreeNode):
    """B rows padded to T tokens, and the M positions that predict a continuation's token.

    Attributes:
        tokens_BT, positions_BT, segments_BT: position -1 is padding.
        source_M: index of the predicting position in the flattened [B·T]; padding is 0.
        target_M: the predicted id.
        used: how many of the M are not padding, a scalar.
    """

    tokens_BT: jax.Array | np.ndarray
    positions_BT: jax.Array | np.ndarray
    segments_BT: jax.Array | np.ndarray
    source_M: jax.Array | np.ndarray
    target_M: jax.Array | np.ndarray
    used: jax.Array | np.ndarray


def check_requests(requests: Sequence[Request], vocab_size: int, room: int) -> None:
    """Reads every request before anything runs.

    Args:
        requests: to be scored.
        vocab_size: V.
        room: the longest continuation that the model can read after one token of context.

    Raises:
        DataError: for an empty context, an empty or too long continuation, or an id that the model lacks.
    """
    for i, (context, continuations) in enumerate(requests):
        if len(context) == 0:
            raise DataError(
                f"request {i} has an empty context",
                field=f"requests.{i}.context",
                code="empty",
                remedy="pass the model's bos or eos id as its context",
            )
        check_tokens(context, vocab_size, f"requests.{i}.context")
        for continuation in continuations:
            if len(continuation) == 0:
                raise DataError(
                    f"request {i} has an empty continuation: there is nothing to score",
                    field=f"requests.{i}.continuation",
                    code="empty",
                )
            if len(continuation) > room:
                raise DataError(
                    f"request {i} has a continuation of {len(continuation)} tokens, the model has room for {room}",
                    field=f"requests.{i}.continuation",
                    code="too long",
                    remedy="shorten it or use a model with more positions",
                )
            check_tokens(continuation, vocab_size, f"requests.{i}.continuation")


def split_rows(index: int, request: Request, most: int) -> Iterator[Row]:
    """One row for a request, or several, each with the whole context, where one would exceed `most` tokens."""
    context, continuations = request
    first, length = 0, len(context)
    for k, continuation in enumerate(continuations):
        if k > first and length + len(continuation) - 1 > most:
            yield Row(index, first, context, continuations[first:k])
            first, length = k, len(context)
        length += len(continuation) - 1
    if first < len(continuations):
        yield Row(index, first, context, continuations[first:])


def truncated_rows(index: int, request: Request, prefix_ids: Sequence[int], limit: int) -> Iterator[Row]:
    """A row per continuation for a request of more than `limit` tokens: its context loses tokens from the left.

    As in lm-eval, each continuation keeps as much context as fits beside it, so they share none.
    """
    context = [*prefix_ids, *request.context]
    for k, continuation in enumerate(request.continuations):
        keep = limit - len(continuation) + 1
        yield Row(index, k, context[-keep:], [continuation])


def batches(rows: Iterable[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of similar length together, longest first; at most `batch_tokens` after padding, but at least one row.

    A full batch has a power of two of rows, which depends only on its padded length.
    """
    queue = sorted(rows, key=lambda row: row.length, reverse=True)
    while queue:
        fit = max(1, batch_tokens // bucket(queue[0].length))
        # The largest power of two that fits.
        count = 1 << (fit.bit_length() - 1)
        yield queue[:count]
        queue = queue[count:]


def pack(rows: Sequence[Row], offset: int, B: int) -> RowBatch:
    """A batch of rows as arrays.

    Args:
        rows: at least one.
        offset: position of the contexts' first token.
        B: rows of the batch; missing ones are padding throughout.

    Returns:
        arrays of B rows, T tokens (a bucket), and M = B·T predicted positions; more only where continuations of
        single tokens outnumber the tokens read.
    """
    T = bucket(max(row.length for row in rows))
    tokens_BT, segments_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    positions_BT = np.full((B, T), -1, np.int32)
    sources, targets = [], []
    for b, row in enumerate(rows):
        at = n = len(row.context)
        tokens_BT[b, :n], positions_BT[b, :n] = row.context, np.arange(offset, offset + n)
        for segment, continuation in enumerate(row.continuations, start=1):
            end = at + len(continuation) - 1
            tokens_BT[b, at:end], segments_BT[b, at:end] = continuation[:-1], segment
            positions_BT[b, at:end] = np.arange(offset + n, offset + n + end - at)
            # The context's last token predicts the continuation's first; after that each token the next.
            sources += [b * T + n - 1, *range(b * T + at, b * T + end)]
            targets += continuation
            at = end
    M = max(B * T, power_of_two(len(targets)))
    source_M, target_M = np.zeros(M, np.int32), np.zeros(M, np.int32)
    source_M[: len(sources)], target_M[: len(targets)] = sources, targets
    return RowBatch(tokens_BT, positions_BT, segments_BT, source_M, target_M, np.array(len(targets), np.int32))
