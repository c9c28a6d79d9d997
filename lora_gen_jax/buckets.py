"""Lists of token ids of any length to padded arrays of few shapes, so that few programs are compiled.

In: lists of ids. Out: tokens and positions [B, T], right-padded, int32; position -1 marks padding.
"""

from collections.abc import Sequence

import numpy as np

from lora_gen_jax.errors import DataError


def bucket(n: int, minimum: int = 16) -> int:
    """The padded size for n tokens: steps of `minimum`, and of a quarter of the power of two below n once larger.

    With 16: 16, 32, 48, …, 128, 160, 192, 224, 256, 320, …. Padding adds 10 % on average and at most 25 % above
    64 tokens, for 24 programs up to 2048 tokens and 4 more per doubling. Only powers of two would need 8 programs
    but add 40 % on average, which a prefill pays in full.
    """
    if n <= minimum:
        return minimum
    step = max(minimum, 1 << ((n - 1).bit_length() - 3))
    return -(-n // step) * step


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; for numbers of rows, where padding costs little."""
    return 1 << max(n - 1, 0).bit_length()


def pad_rows(rows: Sequence[Sequence[int]], length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads rows of ids.

    Args:
        rows: at most `count` lists of at most `length` ids.
        length: T.
        count: B; missing rows are padding throughout.

    Returns:
        tokens_BT, positions_BT: int32; padding has id 0 and position -1.
    """
    tokens_BT = np.zeros((count, length), np.int32)
    positions_BT = np.full((count, length), -1, np.int32)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = row
        positions_BT[i, : len(row)] = np.arange(len(row))
    return tokens_BT, positions_BT


def check_tokens(ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Array indexing would clamp an id that the embedding does not have, silently.

    Args:
        ids: token ids.
        vocab_size: V, the rows of the embedding.
        field: where the ids come from, as the error names it.

    Raises:
        DataError: for an id that is not a whole number, negative or not below `vocab_size`.
    """
    if len(ids) == 0:
        return
    known = np.asarray(ids)
    # Integers beyond 64 bits are objects to NumPy.
    if known.dtype.kind not in "iu" and not (known.dtype.kind == "O" and all(type(one) is int for one in ids)):
        raise DataError(
            f"{field} holds something other than whole numbers", field=field, code="type", remedy="give token ids"
        )
    for bad in (int(known.min()), int(known.max())):
        if not 0 <= bad < vocab_size:
            raise DataError(
                f"{field} holds token id {bad}, but the model's embedding has ids 0 to {vocab_size - 1}",
                field=field,
                code="unknown id",
                remedy="tokenize it with this model's own tokenizer",
            )
