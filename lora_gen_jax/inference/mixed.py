"""Batches whose rows follow different prompts: each row carries its own prompt's part of the adapter.

In: an adapter of P prompts and B rows, grouped by prompt. Out: the same adapter with one entry per row, so that
a batch of B rows is one program whatever the mixture of prompts.
"""

from typing import Any

import numpy as np

from lora_gen_jax.errors import DataError


def prompt_count(adapter: Any) -> int:
    """P: how many prompts an adapter tells apart; 1 for those that treat all rows alike, and for None."""
    return getattr(adapter, "prompts", 1)


def per_row(adapter: Any, rows: int, padded: int) -> Any:
    """An adapter with one prompt per row.

    Args:
        adapter: of P prompts; row i of the batch follows prompt i // (rows / P). None and adapters of a single
            prompt return unchanged.
        rows: real rows.
        padded: B, the rows of the array; those added follow prompt 0.

    Raises:
        DataError: when the rows do not divide among the prompts.
    """
    prompts = prompt_count(adapter)
    if prompts == 1:
        return adapter
    if rows % prompts:
        raise DataError(
            f"{rows} rows cannot be shared evenly by the adapter's {prompts} prompts",
            field="rows",
            remedy="pass as many each",
        )
    prompt_B = np.concatenate([np.arange(rows) // (rows // prompts), np.zeros(padded - rows, np.int64)])
    return adapter.take(prompt_B)


def require_single_prompt(adapter: Any) -> None:
    """For work that is shared by all rows.

    Raises:
        DataError: when the adapter holds several prompts.
    """
    if (prompts := prompt_count(adapter)) != 1:
        raise DataError(
            f"the adapter holds {prompts} prompts where one is needed", field="adapter", remedy="pass adapter.select(i)"
        )
