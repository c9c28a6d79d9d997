"""One sequence to generate in a batch of many, and what becomes of it.

In: what a user asks. Out: a checked `GenerationRequest`, of which an engine tells `Progress`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lora_gen_jax.buckets import check_tokens
from lora_gen_jax.errors import DataError
from lora_gen_jax.generator.router import Gates
from lora_gen_jax.inference.continuous import STOPS
from lora_gen_jax.inference.decode import GenerationSettings
from lora_gen_jax.inference.edge_model import EdgeModel

Factors = Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One sequence to generate.

    Attributes:
        ids: token ids of the prompt.
        settings: how; its seed gives what `generate` gives for this prompt alone, and it has at most `STOPS` stop ids.
        gates: float32 [L, K], of one specialization; None for the base model.
        factors: {site: {"a": [L, inputs, X], "b": [L, X, outputs]}} that stand beside the gates' update, where a
            specialization was refined by a LoRA; empty without.
    """

    ids: Sequence[int]
    settings: GenerationSettings
    gates: Gates | None = None
    factors: Factors = dataclasses.field(default_factory=dict)


Finish = Literal["stop", "length"]
FINISH: tuple[Finish | None, ...] = (None, "stop", "length")


class Progress(NamedTuple):
    """What a row gained.

    Attributes:
        row: of the batch.
        ids: new ids, without the stop id.
        logprobs: the model's own log-probability of each.
        finish: "stop" or "length" when the sequence has ended, and its row is free; else None.
    """

    row: int
    ids: list[int]
    logprobs: list[float]
    finish: Finish | None


def check_work(work: GenerationRequest, model: EdgeModel, slots: int) -> None:
    """Whether a work can be done with so many slots, by a model whose adapter is the pool.

    Raises:
        DataError: for an empty prompt, an id that the model lacks, one too long for the slots, or gates of another
            pool.
        ConfigError: for a sampling setting outside its range.
    """
    if len(work.ids) == 0:
        raise DataError("the prompt is empty", field="prompt", code="empty", remedy="give it at least one token")
    settings = work.settings
    if settings.max_new_tokens < 1:
        raise DataError(
            f"max_new_tokens={settings.max_new_tokens} generates nothing",
            field="max_new_tokens",
            code="range",
            remedy="use at least 1",
        )
    if len(work.ids) + settings.max_new_tokens > slots:
        raise DataError(
            f"the prompt has {len(work.ids)} tokens and max_new_tokens is {settings.max_new_tokens}, the context has"
            f" room for {slots} together",
            field="max_new_tokens",
            code="too long",
            remedy="shorten the prompt, or ask for fewer new tokens",
        )
    check_tokens(work.ids, model.decoder.config.vocab_size, "prompt")
    if len(settings.stop_ids) > STOPS:
        raise DataError(f"{len(settings.stop_ids)} stop ids were given, there is room for {STOPS}", field="stop_ids")
    if not 0 <= settings.seed < 2**32:
        raise DataError(f"seed={settings.seed} must be 0 to 2^32 - 1", field="seed")
    settings.sampling.check()
    if work.gates is not None:
        _check_gates(work.gates, model)


def _check_gates(gates: Gates, model: EdgeModel) -> None:
    own = None if model.adapter is None else model.adapter.gates
    shape = (model.decoder.config.num_layers, 0 if own is None else own.experts)
    if own is None or gates.shape != shape:
        raise DataError(f"gates have the shape {gates.shape}, the pool takes {shape} (layers, experts)", field="gates")
    if gates.active > own.active:
        raise DataError(f"a layer has {gates.active} gates, the pool's generator makes {own.active}", field="gates")


def factor_rank(factors: Factors) -> int:
    """X, the rank of factors; 0 without any."""
    return next((pair["a"].shape[-1] for pair in factors.values()), 0)


def check_factors(work: GenerationRequest, room: int) -> None:
    """Raises DataError for factors of a higher rank than there is room for."""
    if (rank := factor_rank(work.factors)) > room:
        raise DataError(
            f"the specialization has factors of rank {rank} (refined by a LoRA), and there is room for rank {room}",
            field="factors",
            remedy=f"start with room for {rank}, or refine its gates instead",
        )
