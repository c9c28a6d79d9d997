"""Examples of several prompts as rows of the edge model, laid out as in training.

In: token ids of each prompt's examples. Out: `ExampleRows`. Examples of a prompt share rows, each a segment of its own.
Where some are held out, a prompt stands there several times, each time with other examples held out: its variants.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct

from lora_gen_jax.buckets import bucket, check_tokens, power_of_two
from lora_gen_jax.errors import DataError
from lora_gen_jax.specialization.settings import RefineConfig

ExampleIds = tuple[list[int], list[int]]
"""Token ids of a query and of its answer, its end token included."""
ROW_TOKENS = 512
"""A row holds no more, unless one example alone does: attention within a row grows with the square of its length."""


class ExampleRows(struct.PyTreeNode):
    """B rows: of each of P prompts U variants, of each of those M rows; in this order.

    Attributes:
        tokens_BT, positions_BT, segments_BT: as of `Batch`.
        source_BS, target_BS: where the token stands whose successor is supervised, and that successor.
        train_BS: 1 for a token that the variant learns from.
        held_BS: 1 for a token that the variant holds out.
    """

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    source_BS: Any
    target_BS: Any
    train_BS: Any
    held_BS: Any


def check_examples(examples: Sequence[Sequence[ExampleIds]], vocab_size: int, max_positions: int) -> None:
    """Looks at everything before anything is computed.

    Raises:
        DataError: for a prompt without examples, an empty query or answer, an id that the model lacks, or an example
            that exceeds its positions; the message says which prompt and example.
    """
    for p, pairs in enumerate(examples, start=1):
        if not pairs:
            raise DataError(
                f"prompt {p} has no examples to refine on",
                field=f"examples.{p - 1}",
                code="empty",
                remedy="give at least one, or do not refine",
            )
        for i, (query, answer) in enumerate(pairs, start=1):
            where = f"example {i} of prompt {p}"
            if not query or not answer:
                raise DataError(
                    f"{where} has an empty {'answer' if query else 'query'}",
                    field=f"examples.{p - 1}.{i - 1}",
                    code="empty",
                    remedy="give both",
                )
            if (length := len(query) + len(answer) - 1) > max_positions:
                raise DataError(
                    f"{where} has {length} tokens, the edge model {max_positions} positions",
                    field=f"examples.{p - 1}.{i - 1}",
                    code="too long",
                    remedy="shorten it",
                )
            check_tokens([*query, *answer], vocab_size, where)


def lengths_of(pairs: Sequence[ExampleIds]) -> list[int]:
    """Tokens that the model reads of each example: the last of an answer is predicted only."""
    return [len(query) + len(answer) - 1 for query, answer in pairs]


def row_length(examples: Sequence[Sequence[ExampleIds]]) -> int:
    """T for these prompts together."""
    lengths = [lengths_of(pairs) for pairs in examples]
    return bucket(max(max(max(one), min(sum(one), ROW_TOKENS)) for one in lengths))


def variants(count: int, config: RefineConfig) -> list[set[int]]:
    """Which of a prompt's examples each of its variants holds out; the first variant is the one that is kept."""
    if config.stopping == "folds" and count > 1:
        folds = min(config.folds, count)
        return [set(), *({i for i in range(count) if i % folds == fold} for fold in range(folds))]
    if config.stopping == "held_out" and count > 1:
        held = set(range(4, count, 5))
        return [held or {count - 1}]
    return [set()]


def pack_examples(
    examples: Sequence[Sequence[ExampleIds]], prompts: int, config: RefineConfig, length: int | None = None
) -> tuple[ExampleRows, int]:
    """(rows, U).

    Args:
        examples: of each prompt.
        prompts: P; those beyond `examples` are padding.
        config: which examples are held out.
        length: T, if it is to be longer than these examples need.
    """
    length = length or row_length(examples)
    held = [variants(len(pairs), config) for pairs in examples]
    U = max(map(len, held))
    placed = [_rows_of(lengths_of(pairs), length) for pairs in examples]
    M = power_of_two(max(map(len, placed)))
    slots = [sum(len(pairs[i][1]) for i in row) for pairs, rows in zip(examples, placed, strict=True) for row in rows]
    shape, S = (prompts, U, M), bucket(max(slots))
    tokens, positions = np.zeros((*shape, length), np.int32), np.full((*shape, length), -1, np.int32)
    segments, source = np.zeros((*shape, length), np.int32), np.zeros((*shape, S), np.int32)
    target, train, kept = np.zeros((*shape, S), np.int32), np.zeros((*shape, S), np.float32), None
    kept = np.zeros_like(train)
    for p, (pairs, rows) in enumerate(zip(examples, placed, strict=True)):
        for m, row in enumerate(rows):
            at = slot = 0
            for segment, i in enumerate(row, start=1):
                query, answer = pairs[i]
                ids, count = [*query, *answer[:-1]], len(answer)
                tokens[p, :, m, at : at + len(ids)] = ids
                positions[p, :, m, at : at + len(ids)] = np.arange(len(ids))
                segments[p, :, m, at : at + len(ids)] = segment
                source[p, :, m, slot : slot + count] = np.arange(count) + at + len(query) - 1
                target[p, :, m, slot : slot + count] = answer
                for u, out in enumerate(held[p]):
                    (kept if i in out else train)[p, u, m, slot : slot + count] = 1.0
                at, slot = at + len(ids), slot + count
    arrays = (tokens, positions, segments, source, target, train, kept)
    return ExampleRows(*(x.reshape(-1, x.shape[-1]) for x in arrays)), U


def _rows_of(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices of the examples in each row: the longest first, each in the first row that has room for it."""
    rows: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for r, (used, row) in enumerate(rows):
            if used + lengths[i] <= most:
                rows[r] = used + lengths[i], [*row, i]
                break
        else:
            rows.append((lengths[i], [i]))
    return [sorted(row) for _, row in rows]
