"""Multiple choice: the log-likelihood of every option, by the conventions of lm-evaluation-harness.

In: a model, documents and what stands before their queries. Out: `acc`, `acc_norm`, their standard error and latency.
"""

import functools
import statistics
from collections.abc import Sequence

import numpy as np

from lora_gen_jax.config import EvalConfig
from lora_gen_jax.data.prompts import few_shot_context
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.evaluation.means import standard_error
from lora_gen_jax.evaluation.request_runner import Ids, Runner
from lora_gen_jax.evaluation.timing import best_of
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.rows import Request
from lora_gen_jax.inference.scoring import score
from lora_gen_jax.models import Model

# Documents whose latency is measured, one at a time; the median of their best times is reported.
LATENCY_DOCUMENTS, LATENCY_REPEATS = 5, 3


def pairs_of(
    edge: Model, documents: Sequence[Example], description: str, shots: Sequence[Example]
) -> list[list[tuple[Ids, Ids]]]:
    """For every document a (context, continuation) for each of its options; WinoGrande's stand in the context."""

    def pair(query: str, continuation: str) -> tuple[Ids, Ids]:
        context, more = edge.encoder.pair(few_shot_context(description, shots, query), continuation)
        return tuple(context), tuple(more)

    return [
        [pair(context, document.response) for context in document.contexts]
        if document.contexts
        else [pair(document.query, option) for option in document.options]
        for document in documents
    ]


def logprobs(runner: Runner, pairs: Sequence[Sequence[tuple[Ids, Ids]]]) -> list[list[float]]:
    """Log-probability of every option of every document; what contexts begin with is read once."""
    found = iter(runner.logprobs([pair for document in pairs for pair in document]))
    return [[next(found)[0] for _ in document] for document in pairs]


def metrics(documents: Sequence[Example], logprobs: Sequence[Sequence[float]]) -> dict:
    """`acc`: the most probable option is gold. `acc_norm`: the most probable per character is. Errors as lm-eval's."""
    acc = [float(np.argmax(row) == document.gold) for document, row in zip(documents, logprobs, strict=True)]
    norm = [
        float(np.argmax(np.array(row) / np.array(document.option_lengths)) == document.gold)
        for document, row in zip(documents, logprobs, strict=True)
    ]
    figures = {"acc": float(np.mean(acc)), "acc_norm": float(np.mean(norm))}
    return figures | {"stderr": standard_error(acc), "n": len(acc)}


def latency(model: EdgeModel, pairs: Sequence[Sequence[tuple[Ids, Ids]]], settings: EvalConfig) -> float:
    """Milliseconds to answer one document, its whole context read, nothing shared with other documents."""
    times = []
    for document in pairs[:LATENCY_DOCUMENTS]:
        by_context: dict[Ids, list[Ids]] = {}
        for context, continuation in document:
            by_context.setdefault(context, []).append(continuation)
        run = functools.partial(
            score,
            model,
            [Request(*item) for item in by_context.items()],
            batch_tokens=settings.batch_tokens,
        )
        times.append(best_of(run, LATENCY_REPEATS)[1])
    return round(statistics.median(times) * 1000, 2)
