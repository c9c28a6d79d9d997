"""Prompts to generated tokens: one prefill, then a loop that decodes a token per row and iteration.

In: lists of prompt ids of any length, and an `EdgeModel` (the rows of its adapter may follow different prompts).
Out: `Generation`s, or the same tokens as a stream. The loop's limit, the stop ids and the sampling settings are
arrays and sizes are bucketed: a prefill is compiled per (rows, prompt bucket, slots), the loop per (rows, slots).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_gen_jax.buckets import bucket, check_tokens, pad_rows, power_of_two
from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.errors import DataError
from lora_gen_jax.inference.edge_model import EdgeModel, per_row, require_single_prompt
from lora_gen_jax.inference.prefix import check_length, grow_cache, past_prefix
from lora_gen_jax.inference.sampling import Sampling, row_keys, sample
from lora_gen_jax.placement import padded_rows, place_rows


class Generation(NamedTuple):
    """What was generated for one prompt.

    Attributes:
        ids: new token ids, without the stop id.
        finish: "stop" when a stop id was drawn, "length" when `max_new_tokens` were reached.
        logprobs: the model's own log-probability of each id, before temperature and filters.
    """

    ids: list[int]
    finish: Literal["stop", "length"]
    logprobs: list[float]


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        max_new_tokens: at most this many new tokens a row.
        stop_ids: ids that end a row.
        sampling: how a token is drawn; greedy when left out.
        seed: of the draws; row i draws the same whatever the other rows are.
    """

    max_new_tokens: int
    stop_ids: Sequence[int] = ()
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0


class Drawing(struct.PyTreeNode):
    """The settings as compiled programs read them.

    Attributes:
        sampling: checked settings.
        stop_ids_X: padded with -1.
        key: of the whole call; each step and row derives its own.
    """

    sampling: Sampling
    stop_ids_X: np.ndarray
    key: jax.Array


class DecodeState(struct.PyTreeNode):
    """What one iteration passes to the next.

    Attributes:
        step: new tokens so far, a scalar.
        done_B: the row drew a stop id, or is padding.
        count_B: new tokens of the row, its stop id not counted.
        tokens_BS, logprobs_BS: new tokens by step; beyond `count_B` meaningless.
        length_B: tokens before the first new one, prefix included.
        cache: keys and values of all tokens but the newest, the prefix's left out.
    """

    step: jax.Array
    done_B: jax.Array
    count_B: jax.Array
    tokens_BS: jax.Array
    logprobs_BS: jax.Array
    length_B: jax.Array
    cache: KVCache


def generate(model: EdgeModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[Generation]:
    """Generates for all prompts at once.

    Args:
        model: whose adapter is of one prompt for all rows, or of several (`GatedPool`, `PromptLoRA`).
        prompts: token ids per row; rows of an adapter with P prompts are grouped by prompt.
        settings: how.

    Returns:
        one `Generation` per prompt, in order.

    Raises:
        DataError: for an empty prompt, one that does not fit the model together with `max_new_tokens`, a token id
            that the model lacks, or rows that do not divide among the adapter's prompts.
        ConfigError: for a sampling setting outside its range.
    """
    if len(prompts) == 0:
        return []
    later, drawing, state = _start(model, prompts, settings)
    state = jax.device_get(_decode(later, drawing, state, np.int32(settings.max_new_tokens)).replace(cache=None))
    return [_generation(state, row) for row in range(len(prompts))]


def stream(
    model: EdgeModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> Iterator[list[int | None]]:
    """As `generate`, token by token, from the same programs.

    Returns:
        an iterator over steps; each gives one new id per row, None for rows that have ended. It ends when all rows
        have.

    Raises:
        as `generate`, before the first step.
    """
    if len(prompts) == 0:
        return iter(())
    later, drawing, state = _start(model, prompts, settings)

    def steps(state: DecodeState) -> Iterator[list[int | None]]:
        for step in range(settings.max_new_tokens):
            if step:
                state = _decode(later, drawing, state, np.int32(step + 1))
            # Indexed on the host: on the device every step would be a program of its own.
            tokens_BS, done_B = jax.device_get((state.tokens_BS, state.done_B))
            if done_B.all():
                return
            rows = zip(tokens_BS[: len(prompts), step], done_B, strict=False)
            yield [None if done else int(token) for token, done in rows]

    return steps(state)


def _check(model: EdgeModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise DataError(
            f"max_new_tokens={max_new_tokens} generates nothing",
            field="max_new_tokens",
            code="range",
            remedy="use at least 1",
        )
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(
                f"prompt {i} is empty",
                field=f"prompts.{i}",
                code="empty",
                remedy="give it at least one token, the model's bos or eos for example",
            )
        check_tokens(prompt, model.decoder.config.vocab_size, f"prompts.{i}")
        check_length(
            model.before + len(prompt) + max_new_tokens,
            model.decoder.config,
            f"shorten prompt {i} ({len(prompt)} tokens) or lower max_new_tokens ({max_new_tokens})",
        )


def _start(
    model: EdgeModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> tuple[EdgeModel, Drawing, DecodeState]:
    """The model that reads what is written, how it draws, and the state after the first new token of each row."""
    _check(model, prompts, settings.max_new_tokens)
    if model.prefix is not None:
        require_single_prompt(model.adapter)
    rows, longest = padded_rows(len(prompts), model.params), bucket(max(map(len, prompts)))
    model = model.replace(adapter=per_row(model.adapter, len(prompts), rows))
    stop_ids_X = np.full(max(8, power_of_two(len(settings.stop_ids))), -1, np.int32)
    stop_ids_X[: len(settings.stop_ids)] = settings.stop_ids
    drawing = Drawing(settings.sampling.checked(), stop_ids_X, jax.random.key(settings.seed))
    tokens_BT, positions_BT = pad_rows(prompts, longest, rows)
    batch = place_rows((tokens_BT, past_prefix(positions_BT, model.before)), model.params)
    slots = bucket(longest + settings.max_new_tokens)
    return model.elsewhere.program, drawing, _prefill(slots, model.program, drawing, batch)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(slots: int, model: EdgeModel, drawing: Drawing, batch: tuple[Any, Any]) -> DecodeState:
    """Reads the prompts and draws the first token of each row."""
    tokens_BT, positions_BT = batch
    B, T = tokens_BT.shape
    # Slots for the new tokens come afterwards: here every query would look at them in vain.
    cache = KVCache.empty(model.decoder.config, B, T, model.decoder.dtype)
    hidden_BTD, cache = model.read(tokens_BT, positions_BT, cache=cache)
    last_B = jnp.argmax(positions_BT, axis=1)
    logits_BV = model.logits(hidden_BTD[jnp.arange(B), last_B])
    length_B = jnp.max(positions_BT, axis=1) + 1
    state = DecodeState(
        step=jnp.zeros((), jnp.int32),
        done_B=length_B == 0,
        count_B=jnp.zeros((B,), jnp.int32),
        tokens_BS=jnp.zeros((B, slots), jnp.int32),
        logprobs_BS=jnp.zeros((B, slots), float),
        length_B=length_B,
        cache=grow_cache(cache, slots),
    )
    return _append(state, logits_BV, drawing)


@functools.partial(jax.jit, donate_argnums=2)
def _decode(model: EdgeModel, drawing: Drawing, state: DecodeState, limit: Any) -> DecodeState:
    """Decodes until there are `limit` new tokens or all rows are done."""

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.done_B)

    def step(state: DecodeState) -> DecodeState:
        newest_B1 = jax.lax.dynamic_index_in_dim(state.tokens_BS, state.step - 1, axis=1)
        position_B = jnp.where(state.done_B, -1, state.length_B + state.step - 1)
        hidden_B1D, cache = model.read(newest_B1, position_B[:, None], cache=state.cache)
        return _append(state.replace(cache=cache), model.logits(hidden_B1D[:, 0]), drawing)

    return jax.lax.while_loop(unfinished, step, state)


def _append(state: DecodeState, logits_BV: jax.Array, drawing: Drawing) -> DecodeState:
    id_B = sample(logits_BV, drawing.sampling, row_keys(drawing.key, state.step, len(logits_BV)))
    chosen_B = jnp.take_along_axis(logits_BV, id_B[:, None], axis=1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=1)
    done_B = state.done_B | jnp.any(id_B[:, None] == drawing.stop_ids_X[None], axis=1)
    return state.replace(
        step=state.step + 1,
        done_B=done_B,
        count_B=state.count_B + (~done_B).astype(jnp.int32),
        tokens_BS=jax.lax.dynamic_update_slice_in_dim(state.tokens_BS, id_B[:, None], state.step, axis=1),
        logprobs_BS=jax.lax.dynamic_update_slice_in_dim(state.logprobs_BS, logprob_B[:, None], state.step, axis=1),
    )


def _generation(state: DecodeState, row: int) -> Generation:
    count = int(state.count_B[row])
    ids, logprobs = state.tokens_BS[row, :count].tolist(), state.logprobs_BS[row, :count].tolist()
    return Generation(ids, "stop" if state.done_B[row] else "length", logprobs)
