"""Many queries of many specialisations, answered in the cheaper of two ways.

In: `Work`s in any order. Out: `Generation`s in that order. Mixed: all in one batch beside the unmerged weights, each
row with its own gates. Merged: one specialisation after another, merged into the weights, with nothing beside them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.merge import merge, merge_over
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.inference.buckets import bucket
from lora_gen_jax.inference.decode import Generation
from lora_gen_jax.inference.engine import Engine, Work, check_gates

How = Literal["auto", "mixed", "merged"]
FULL_BATCH = 32
"""Queries of one specialisation that are worth a merge: they fill a batch by themselves, and need no side path."""


def answer_all(
    decoder: Decoder,
    params: Any,
    pool: GatedPool | None,
    works: Sequence[Work],
    *,
    rows: int = 32,
    how: How = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Answers all works.

    Args:
        decoder, params: the base model, which stays valid.
        pool: an adapter with the pool; its gates do not matter. None where all works are for the base model.
        works: each with the gates of its specialisation, or None for the base model.
        rows: sequences at the same time.
        how: "mixed" or "merged"; "auto" takes the one that is likely to be faster (`mixed_is_better`).
        progress: called with the number of works done and their total.

    Returns:
        one `Generation` per work, in order.

    Raises:
        DataError, ConfigError: as `Engine` and `Engine.check`, saying which work; before anything is generated.
    """
    if not works:
        return []
    slots = min(bucket(max(len(work.ids) + work.max_new_tokens for work in works)), decoder.config.max_positions)
    rows, groups = min(rows, len(works)), by_specialisation(works)
    mixed = how == "mixed" or (how == "auto" and mixed_is_better([len(group) for group in groups]))
    # Merged, the rows of a batch have nothing beside the weights.
    rowwise = works if mixed else [dataclasses.replace(work, gates_LE=None) for work in works]
    engine = Engine(decoder, params, pool if mixed else None, rows=rows, slots=slots)
    for i, (work, row) in enumerate(zip(works, rowwise, strict=True)):
        try:
            engine.check(row)
            check_gates(work, decoder, pool)
        except LoraGenError as error:
            raise type(error)(f"request {i + 1} of {len(works)}: {error}") from error
    found: dict[int, Generation] = {}
    held = None
    for group in [range(len(works))] if mixed else groups:
        gates_LE = works[group[0]].gates_LE
        if not mixed and gates_LE is None:
            engine.params = params
        elif not mixed:
            assert pool is not None
            adapter = pool.replace(scanned={**pool.scanned, "gates": jnp.asarray(gates_LE)[:, None]})
            engine.params = held = merge(params, adapter) if held is None else merge_over(held, params, adapter)

        def note(place: int, generation: Generation, group: Sequence[int] = group) -> None:
            found[group[place]] = generation
            if progress is not None:
                progress(len(found), len(works))

        engine.run([rowwise[i] for i in group], note)
    return [found[i] for i in range(len(works))]


def by_specialisation(works: Sequence[Work]) -> list[list[int]]:
    """Indices of the works that share their gates, the base model's first."""
    groups: dict[bytes, list[int]] = {}
    for i, work in enumerate(works):
        groups.setdefault(b"" if work.gates_LE is None else work.gates_LE.tobytes(), []).append(i)
    return [groups[key] for key in sorted(groups)]


def mixed_is_better(sizes: Sequence[int]) -> bool:
    """Whether queries are likely to be answered faster unmerged in one batch than merged, a group after another.

    Args:
        sizes: queries of each specialisation.
    """
    return len(sizes) > 1 and sum(sizes) < FULL_BATCH * len(sizes)
