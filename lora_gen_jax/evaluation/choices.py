"""Multiple choice: the log-likelihood of every option, by the conventions of lm-evaluation-harness.

In: an edge model, documents and what stands before their queries. Out: `acc`, `acc_norm`, their standard error,
tokens in the edge's context and latency. Options of a question share its context; what all contexts begin with is read
once.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_gen_jax.config import EvalConfig
from lora_gen_jax.data.prompts import few_shot_context
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.evaluation.standard_error import standard_error
from lora_gen_jax.inference.prefix import encode_prefix
from lora_gen_jax.inference.rows import Request
from lora_gen_jax.inference.scoring import Score, score
from lora_gen_jax.models import Model

# Documents whose latency is measured, one at a time; the median of their best times is reported.
LATENCY_DOCUMENTS, LATENCY_REPEATS = 5, 3


def build_requests(
    edge: Model, documents: Sequence[Example], description: str, shots: Sequence[Example]
) -> list[Request]:
    """One request a document; one per option where the options stand in the context (WinoGrande)."""

    def request(query: str, continuations: Sequence[str]) -> Request:
        context = few_shot_context(description, shots, query)
        pairs = [edge.encoder.pair(context, continuation) for continuation in continuations]
        return Request(pairs[0][0], [continuation for _, continuation in pairs])

    requests = []
    for document in documents:
        if document.contexts:
            requests += [request(context, [document.response]) for context in document.contexts]
        else:
            requests.append(request(document.query, document.options))
    return requests


def run(
    edge: Model, params: Any, requests: list[Request], settings: EvalConfig, share_prefix: bool, progress: Any = None
) -> list[Score]:
    """Scores requests; what all contexts begin with is read once."""
    shared = common_prefix([request.context for request in requests]) if share_prefix else 0
    if shared == 0:
        return score(edge.decoder, params, requests, batch_tokens=settings.batch_tokens, progress=progress)
    prefix = encode_prefix(edge.decoder, params, requests[0].context[:shared])
    rest = [Request(request.context[shared:], request.continuations) for request in requests]
    return score(edge.decoder, params, rest, batch_tokens=settings.batch_tokens, prefix=prefix, progress=progress)


def common_prefix(contexts: Sequence[Sequence[int]]) -> int:
    """How many ids all contexts begin with; each keeps at least one of its own."""
    first, *others = contexts
    length = min(map(len, contexts)) - 1
    for other in others:
        differing = (i for i in range(length) if first[i] != other[i])
        length = next(differing, length)
    return length


def regroup(documents: Sequence[Example], scores: Sequence[Score]) -> list[list[float]]:
    """Log-probability of every option of every document."""
    remaining = iter(scores)
    return [
        [next(remaining).logprobs[0] for _ in document.contexts]
        if document.contexts
        else list(next(remaining).logprobs)
        for document in documents
    ]


def metrics(documents: Sequence[Example], logprobs: Sequence[Sequence[float]]) -> dict:
    """`acc`: the most probable option is gold. `acc_norm`: the most probable per character is. Errors as lm-eval's."""
    acc = [float(np.argmax(row) == document.gold) for document, row in zip(documents, logprobs, strict=True)]
    norm = [
        float(np.argmax(np.array(row) / np.array(document.option_lengths)) == document.gold)
        for document, row in zip(documents, logprobs, strict=True)
    ]
    figures = {"acc": float(np.mean(acc)), "acc_norm": float(np.mean(norm))}
    return figures | {"stderr": standard_error(acc), "n": len(acc)}


def latency(edge: Model, params: Any, requests: Sequence[Request], settings: EvalConfig) -> float:
    """Milliseconds to answer one document, its whole context read, nothing shared with other documents."""
    times = []
    for request in requests:
        best = float("inf")
        for attempt in range(LATENCY_REPEATS + 1):
            began = time.perf_counter()
            score(edge.decoder, params, [request], batch_tokens=settings.batch_tokens)
            # The first run may compile.
            best = min(best, time.perf_counter() - began) if attempt else best
        times.append(best)
    return round(statistics.median(times) * 1000, 2)
