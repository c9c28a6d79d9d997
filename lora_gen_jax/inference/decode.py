"""Prompts to generated tokens: one prefill, then a loop that decodes a token per row and iteration.

In: lists of prompt ids of any length, an optional adapter (rows may follow different prompts) and prefix.
Out: `Generation`s, or the same tokens as a stream. The loop's limit, the stop ids and the sampling settings are
arrays and sizes are bucketed: a prefill is compiled per (rows, prompt bucket, slots), the loop per (rows, slots).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_gen_jax.adapters.protocol import Adapter
from lora_gen_jax.buckets import bucket, check_tokens, pad_rows, power_of_two
from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import DataError
from lora_gen_jax.inference.forward import forward_only, logits_at
from lora_gen_jax.inference.mixed import per_row, require_single_prompt
from lora_gen_jax.inference.prefix import Prefix, check_length, grow_cache, past_prefix, prefix_cache, taken_positions
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


class Inputs(struct.PyTreeNode):
    """What the compiled programs read: the weights, what modifies them, and the settings.

    Attributes:
        params: of the decoder.
        adapter: of one prompt, or of one per row; None for the base model.
        prefix: keys and values that all rows begin with; None without.
        sampling: checked settings.
        stop_ids_X: padded with -1.
        key: of the whole call; each step and row derives its own.
    """

    params: Any
    adapter: Any
    prefix: KVCache | None
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


def generate(
    decoder: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    adapter: Adapter | None = None,
    prefix: Prefix | None = None,
) -> list[Generation]:
    """Generates for all prompts at once.

    Args:
        decoder, params: the model.
        prompts: token ids per row; rows of an adapter with P prompts are grouped by prompt.
        max_new_tokens: at most this many new tokens a row.
        stop_ids: ids that end a row.
        sampling: greedy when left out.
        seed: of the draws; row i draws the same whatever the other rows are.
        adapter: of one prompt for all rows, or of several (`GatedPool`, `PromptLoRA`).
        prefix: read before every prompt.

    Returns:
        one `Generation` per prompt, in order.

    Raises:
        DataError: for an empty prompt, one that does not fit the model together with `max_new_tokens`, a token id
            that the model lacks, or rows that do not divide among the adapter's prompts.
        ConfigError: for a sampling setting outside its range.
    """
    if len(prompts) == 0:
        return []
    _check(decoder, prompts, max_new_tokens, prefix)
    adapter = per_row(adapter, len(prompts), padded_rows(len(prompts), params))
    inputs = _inputs((params, adapter, prefix), stop_ids, sampling, seed)
    state = _start(decoder, inputs, prompts, max_new_tokens, taken_positions(prefix))
    later = _later(inputs)
    state = jax.device_get(_decode(forward_only(decoder), later, state, np.int32(max_new_tokens)).replace(cache=None))
    return [_generation(state, row) for row in range(len(prompts))]


def stream(
    decoder: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    adapter: Adapter | None = None,
    prefix: Prefix | None = None,
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
    _check(decoder, prompts, max_new_tokens, prefix)
    adapter = per_row(adapter, len(prompts), padded_rows(len(prompts), params))
    inputs = _inputs((params, adapter, prefix), stop_ids, sampling, seed)
    state = _start(decoder, inputs, prompts, max_new_tokens, taken_positions(prefix))
    later = _later(inputs)

    def steps(state: DecodeState) -> Iterator[list[int | None]]:
        for step in range(max_new_tokens):
            if step:
                state = _decode(forward_only(decoder), later, state, np.int32(step + 1))
            # Indexed on the host: on the device every step would be a program of its own.
            tokens_BS, done_B = jax.device_get((state.tokens_BS, state.done_B))
            if done_B.all():
                return
            rows = zip(tokens_BS[: len(prompts), step], done_B, strict=False)
            yield [None if done else int(token) for token, done in rows]

    return steps(state)


def _check(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, prefix: Prefix | None) -> None:
    if max_new_tokens < 1:
        raise DataError(
            f"max_new_tokens={max_new_tokens} generates nothing",
            field="max_new_tokens",
            code="range",
            remedy="use at least 1",
        )
    before = taken_positions(prefix)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(
                f"prompt {i} is empty",
                field=f"prompts.{i}",
                code="empty",
                remedy="give it at least one token, the model's bos or eos for example",
            )
        check_tokens(prompt, decoder.config.vocab_size, f"prompts.{i}")
        check_length(
            before + len(prompt) + max_new_tokens,
            decoder.config,
            f"shorten prompt {i} ({len(prompt)} tokens) or lower max_new_tokens ({max_new_tokens})",
        )


def _inputs(
    model: tuple[Any, Any, Prefix | None], stop_ids: Sequence[int], sampling: Sampling | None, seed: int
) -> Inputs:
    params, adapter, prefix = model
    if prefix is not None:
        require_single_prompt(adapter)
    stop_ids_X = np.full(max(8, power_of_two(len(stop_ids))), -1, np.int32)
    stop_ids_X[: len(stop_ids)] = stop_ids
    settings = (sampling or Sampling()).checked()
    return Inputs(params, adapter, prefix_cache(prefix), settings, stop_ids_X, jax.random.key(seed))


def _later(inputs: Inputs) -> Inputs:
    """What the tokens that are written read."""
    return inputs if inputs.adapter is None else inputs.replace(adapter=inputs.adapter.elsewhere)


def _start(
    decoder: Decoder, inputs: Inputs, prompts: Sequence[Sequence[int]], max_new_tokens: int, before: int
) -> DecodeState:
    longest = bucket(max(map(len, prompts)))
    tokens_BT, positions_BT = pad_rows(prompts, longest, padded_rows(len(prompts), inputs.params))
    slots = bucket(longest + max_new_tokens)
    batch = place_rows((tokens_BT, past_prefix(positions_BT, before)), inputs.params)
    return _prefill(forward_only(decoder), slots, inputs, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(decoder: Decoder, slots: int, inputs: Inputs, batch: tuple[Any, Any]) -> DecodeState:
    """Reads the prompts and draws the first token of each row."""
    tokens_BT, positions_BT = batch
    B, T = tokens_BT.shape
    # Slots for the new tokens come afterwards: here every query would look at them in vain.
    cache = KVCache.empty(decoder.config, B, T, decoder.dtype)
    hidden_BTD, cache = decoder.apply(
        {"params": inputs.params},
        tokens_BT,
        positions_BT,
        adapter=inputs.adapter,
        cache=cache,
        prefix=inputs.prefix,
    )
    assert isinstance(cache, KVCache)
    last_B = jnp.argmax(positions_BT, axis=1)
    logits_BV = logits_at(decoder, inputs.params, hidden_BTD[jnp.arange(B), last_B])
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
    return _append(state, logits_BV, inputs)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(decoder: Decoder, inputs: Inputs, state: DecodeState, limit: jax.Array) -> DecodeState:
    """Decodes until there are `limit` new tokens or all rows are done."""

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.done_B)

    def step(state: DecodeState) -> DecodeState:
        newest_B1 = jax.lax.dynamic_index_in_dim(state.tokens_BS, state.step - 1, axis=1)
        position_B = jnp.where(state.done_B, -1, state.length_B + state.step - 1)
        hidden_B1D, cache = decoder.apply(
            {"params": inputs.params},
            newest_B1,
            position_B[:, None],
            adapter=inputs.adapter,
            cache=state.cache,
            prefix=inputs.prefix,
        )
        logits_BV = logits_at(decoder, inputs.params, hidden_B1D[:, 0])
        return _append(state.replace(cache=cache), logits_BV, inputs)

    return jax.lax.while_loop(unfinished, step, state)


def _append(state: DecodeState, logits_BV: jax.Array, inputs: Inputs) -> DecodeState:
    id_B = sample(logits_BV, inputs.sampling, row_keys(inputs.key, state.step, len(logits_BV)))
    chosen_B = jnp.take_along_axis(logits_BV, id_B[:, None], axis=1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=1)
    done_B = state.done_B | jnp.any(id_B[:, None] == inputs.stop_ids_X[None], axis=1)
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
