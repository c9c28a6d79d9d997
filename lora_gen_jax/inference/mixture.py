"""Many queries of many specializations, answered in the cheaper of two ways.

In: `GenerationRequest`s in any order. Out: `Generation`s in that order. Mixed: all in one batch, weights unmerged, each
row with its own gates. Merged: one specialization after another, merged into the weights, with nothing beside them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.merge import merge, merge_over
from lora_gen_jax.buckets import bucket
from lora_gen_jax.decoder.quantized import quantized_name
from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.inference.continuous import with_gates
from lora_gen_jax.inference.decode import Generation
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.engine import Engine
from lora_gen_jax.inference.work import GenerationRequest, check_work, factor_rank

How = Literal["auto", "mixed", "merged"]
FULL_BATCH = 32
"""Queries of one specialization that are worth a merge: they fill a batch by themselves, and need no side path."""


def answer_all(
    model: EdgeModel,
    works: Sequence[GenerationRequest],
    *,
    rows: int = 32,
    how: How = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Answers all works.

    Args:
        model: the base model, whose weights stay valid. Its adapter has the pool, whose gates do not matter; None where
            all works are for the base model.
        works: each with the gates of its specialization, or None for the base model.
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
    longest = max(len(work.ids) + work.settings.max_new_tokens for work in works)
    slots = min(bucket(longest), model.decoder.config.max_positions)
    for i, work in enumerate(works):
        try:
            check_work(work, model, slots)
        except LoraGenError as error:
            raise error.within(f"request {i + 1} of {len(works)}") from error
    groups = by_specialization(works)
    # Nothing is merged into quantized weights.
    apart = quantized_name(model.params) is not None or mixed_is_better([len(group) for group in groups])
    mixed = how == "mixed" or (how == "auto" and apart)
    # Free rows are computed, too: merged, no more are needed than the largest group has.
    most = len(works) if mixed else max(map(len, groups))
    rank = max(factor_rank(work.factors) for work in works)
    unmerged = model if mixed else model.replace(adapter=None)
    engine = Engine(unmerged, rows=min(rows, most), slots=slots, rank=rank)
    found: dict[int, Generation] = {}

    def note(i: int, generation: Generation) -> None:
        found[i] = generation
        if progress is not None:
            progress(len(found), len(works))

    if mixed:
        engine.run(works, note)
    else:
        _merged(engine, model.adapter, [[(i, works[i]) for i in group] for group in groups], note)
    return [found[i] for i in range(len(works))]


def _merged(
    engine: Engine,
    pool: GatedPool | None,
    groups: Sequence[Sequence[tuple[int, GenerationRequest]]],
    note: Callable[..., None],
) -> None:
    """One specialization after another in the engine's weights; `note` is told each work's number and what it gave."""
    base, held = engine.model.params, None
    for group in groups:
        gates = group[0][1].gates
        if gates is None:
            params = base
        else:
            assert pool is not None
            factors = jax.tree.map(lambda x: jnp.asarray(x)[:, None], group[0][1].factors)
            gates = jax.tree.map(lambda x: jnp.asarray(x)[:, None], gates)
            adapter = with_gates(pool, gates, factors or None)
            assert adapter is not None
            params = held = merge(base, adapter) if held is None else merge_over(held, base, adapter)
        engine.model = engine.model.replace(params=params)
        numbers = [i for i, _ in group]
        # The rows have nothing beside the weights.
        plain = [dataclasses.replace(work, gates=None, factors={}) for _, work in group]
        engine.run(plain, lambda place, generation, numbers=numbers: note(numbers[place], generation))


def by_specialization(works: Sequence[GenerationRequest]) -> list[list[int]]:
    """Indices of the works that share their gates and factors, the base model's first."""
    groups: dict[tuple[bytes, int], list[int]] = {}
    for i, work in enumerate(works):
        gates = b"".join(x.tobytes() for x in jax.tree.leaves(work.gates))
        groups.setdefault((gates, id(work.factors) if work.factors else 0), []).append(i)
    return [group for _, group in sorted(groups.items(), key=lambda item: (item[0][0], item[1]))]


def mixed_is_better(sizes: Sequence[int]) -> bool:
    """Whether queries are likely to be answered faster unmerged in one batch than merged, a group after another.

    Args:
        sizes: queries of each specialization.
    """
    return len(sizes) > 1 and sum(sizes) < FULL_BATCH * len(sizes)
