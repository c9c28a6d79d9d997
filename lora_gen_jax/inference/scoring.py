"""Log-likelihoods of continuations, as lm-eval's multiple-choice tasks want them.

In: an `EdgeModel` and requests (a context and its continuations). Out: a `Score` per request, in
order. A context is read once for all its continuations, a prefix once for all requests, and logits are computed
only where they predict a continuation's token, a chunk of positions at a time.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax.inference.edge_model import EdgeModel, require_single_prompt
from lora_gen_jax.inference.rows import (
    Request,
    Row,
    RowBatch,
    batches,
    check_requests,
    pack,
    split_rows,
    truncated_rows,
)
from lora_gen_jax.placement import padded_rows, place_rows

# Logits held at a time: 2^24 fp32 numbers are 64 MiB, 341 positions of a vocabulary of 49k or 64 of one of 256k.
LOGITS_IN_MEMORY = 1 << 24

log = logging.getLogger(__name__)


class Score(NamedTuple):
    """What the model says about one request.

    Attributes:
        logprobs: natural-log probability of each continuation given the context, summed over its tokens.
        is_greedy: whether greedy decoding would give exactly that continuation.
    """

    logprobs: tuple[float, ...]
    is_greedy: tuple[bool, ...]


def score(
    model: EdgeModel,
    requests: Sequence[Request],
    *,
    batch_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Scores all continuations of all requests.

    Requests that are too long for the model lose context from the left, as in lm-eval; how many is logged.

    Args:
        model: whose adapter is of a single prompt. Its prefix is read before every context, which leaves it out. A
            request too long for the model loses the prefix's ids first; of a soft prompt, which has none, nothing is
            cut.
        requests: `Request`s, or pairs (context ids, continuations).
        batch_tokens: about how many tokens, padding included, are read at a time; a longer row is a batch of its own.
        progress: called after each batch with the number of continuations scored so far and their total.

    Returns:
        one `Score` per request, in order.

    Raises:
        DataError: for an empty context, an empty or too long continuation, a token id that the model lacks, or an
            adapter of several prompts.
    """
    require_single_prompt(model.adapter)
    requests = [Request(*request) for request in requests]
    following, cut = _plan(model, requests, batch_tokens)
    logprobs = [[0.0] * len(request.continuations) for request in requests]
    greedy = [[False] * len(request.continuations) for request in requests]
    done, total = 0, sum(map(len, logprobs))
    runs = (_run(model, following, batch_tokens), _run(model.replace(prefix=None), cut, batch_tokens))
    for rows, logprob_M, greedy_M in itertools.chain(*runs):
        at = 0
        for row in rows:
            for k, continuation in enumerate(row.continuations, start=row.first):
                tokens = slice(at, at := at + len(continuation))
                logprobs[row.request][k] = float(logprob_M[tokens].sum(dtype=np.float64))
                greedy[row.request][k] = bool(greedy_M[tokens].all())
                done += 1
        if progress is not None:
            progress(done, total)
    return [Score(tuple(sums), tuple(flags)) for sums, flags in zip(logprobs, greedy, strict=True)]


def _plan(model: EdgeModel, requests: Sequence[Request], batch_tokens: int) -> tuple[list[Row], list[Row]]:
    """Rows that follow the prefix, and rows that had to cut it."""
    before, limit, prefix = model.before, model.decoder.config.max_positions, model.prefix
    soft = prefix is not None and not prefix.ids
    check_requests(requests, model.decoder.config.vocab_size, limit - (before if soft else 0))
    following, cut, truncated = [], [], 0
    for i, request in enumerate(requests):
        longest = max(map(len, request.continuations), default=1)
        if before + len(request.context) + longest - 1 <= limit:
            following += split_rows(i, request, batch_tokens)
            continue
        truncated += 1
        if soft:
            following += truncated_rows(i, request, (), limit - before)
        else:
            cut += truncated_rows(i, request, () if prefix is None else prefix.ids, limit)
    if truncated:
        message = "%d of %d requests exceed the model's %d positions: their contexts were cut from the left"
        log.warning(message, truncated, len(requests), limit)
    return following, cut


def _run(
    model: EdgeModel, rows: Sequence[Row], batch_tokens: int
) -> Iterator[tuple[list[Row], np.ndarray, np.ndarray]]:
    """Batches of rows with log-probability and greediness of each predicted token, in the rows' order.

    The next batch is dispatched before the results of the last are waited for.
    """
    program, params, offset = model.program, model.params, model.before
    waiting: list[tuple[list[Row], tuple[jax.Array, jax.Array]]] = []
    for batch in batches(rows, batch_tokens):
        packed = pack(batch, offset, padded_rows(len(batch), params))
        tokens, positions, segments = place_rows((packed.tokens_BT, packed.positions_BT, packed.segments_BT), params)
        packed = packed.replace(tokens_BT=tokens, positions_BT=positions, segments_BT=segments)
        waiting.append((batch, _score_batch(program, packed)))
        if len(waiting) > 1:
            yield _fetch(waiting.pop(0))
    for item in waiting:
        yield _fetch(item)


def _fetch(item: tuple[list[Row], tuple[jax.Array, jax.Array]]) -> tuple[list[Row], np.ndarray, np.ndarray]:
    rows, arrays = item
    logprob_M, greedy_M = jax.device_get(arrays)
    return rows, logprob_M, greedy_M


@jax.jit
def _score_batch(model: EdgeModel, batch: RowBatch) -> tuple[jax.Array, jax.Array]:
    """Log-probability and greediness [M] of the predicted tokens."""
    B, T = batch.tokens_BT.shape
    hidden_BTD, _ = model.read(batch.tokens_BT, batch.positions_BT, segments_BT=batch.segments_BT)
    hidden_XD = hidden_BTD.reshape(B * T, -1)
    M = batch.source_M.shape[0]
    chunk = min(M, max(1, LOGITS_IN_MEMORY // model.decoder.config.vocab_size))

    def score_chunk(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last chunk may start early, so as to end at M: what it computes again comes out the same.
        start = (i * chunk,)
        source_C = jax.lax.dynamic_slice(batch.source_M, start, (chunk,))
        target_C = jax.lax.dynamic_slice(batch.target_M, start, (chunk,))
        logits_CV = model.logits(hidden_XD[source_C])
        chosen_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=1)[:, 0]
        logprob_C = chosen_C - jax.nn.logsumexp(logits_CV, axis=1)
        new = (logprob_C, jnp.argmax(logits_CV, axis=1) == target_C)
        return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice(old, x, start), results, new)

    chunks = (batch.used + chunk - 1) // chunk
    return jax.lax.fori_loop(0, chunks, score_chunk, (jnp.zeros(M, float), jnp.zeros(M, bool)))
