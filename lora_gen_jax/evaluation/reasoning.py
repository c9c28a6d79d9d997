"""Multiple-choice scoring of tasks with the base model, with shots, and specialised.

In: an edge model, tasks and methods. Out: per method and task `acc`, `acc_norm`, their standard error, the number
of documents, tokens in the edge's context and latency; AVE and HAR over the tasks. The conventions are those of
lm-evaluation-harness; the shots are the same for all documents of a task, for the cloud and for in-context learning.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lora_gen_jax.config import EvalConfig
from lora_gen_jax.data.prompts import evaluation_shots, few_shot_context, system_prompt
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError
from lora_gen_jax.inference.prefix import encode_prefix
from lora_gen_jax.inference.rows import Request
from lora_gen_jax.inference.scoring import Score, score
from lora_gen_jax.models import Model

# Documents whose latency is measured, one at a time; the median of their best times is reported.
LATENCY_DOCUMENTS, LATENCY_REPEATS = 5, 3


@dataclasses.dataclass(frozen=True)
class System:
    """What is scored: a method's weights for a task, and whether the edge reads the shots.

    Attributes:
        params_for: from a task's system prompt (None when the task has none) to the edge model's weights.
        reads_prompt: the edge model reads the system prompt before every query (in-context learning).
    """

    params_for: Callable[[str | None], Any]
    reads_prompt: bool = False


def evaluate_task(edge: Model, task: Task, system: System, settings: EvalConfig, progress: Any = None) -> dict:
    """Scores one task.

    Raises:
        DataError: when the task has nothing to score, or a document is not multiple choice.
    """
    documents = scored_documents(task, settings)
    prompt = task_prompt(task, settings)
    params = system.params_for(prompt)
    requests = build_requests(edge, task, documents, settings, system.reads_prompt)
    scores = run(edge, params, requests, settings, share_prefix=system.reads_prompt, progress=progress)
    result = metrics(documents, regroup(documents, scores))
    counts = [len(request.context) for request in requests]
    result["context_tokens"] = round(statistics.fmean(counts), 1)
    result["latency_ms"] = latency(edge, params, requests[:LATENCY_DOCUMENTS], settings)
    return result


def scored_documents(task: Task, settings: EvalConfig) -> list[Example]:
    """The test documents that are scored.

    Raises:
        DataError: when there are none, or one is not multiple choice.
    """
    documents = list(task.test[: settings.limit])
    if not documents:
        raise DataError(f"task {task.name} has no test documents: give it a test split")
    for document in documents:
        if not document.options:
            raise DataError(f"task {task.name}, document {document.id}: it has no options to choose from")
    return documents


def task_prompt(task: Task, settings: EvalConfig) -> str | None:
    """The task's system prompt: its description and the fixed shots; None where it has neither."""
    shots = evaluation_shots(task, settings.shots, settings.seed)
    description = task.descriptions[0] if task.descriptions else ""
    return system_prompt(description, shots) if description.strip() or shots else None


def build_requests(
    edge: Model, task: Task, documents: Sequence[Example], settings: EvalConfig, reads_prompt: bool
) -> list[Request]:
    """One request a document; one per option where the options stand in the context (WinoGrande)."""
    shots = evaluation_shots(task, settings.shots, settings.seed) if reads_prompt else ()
    description = task.descriptions[0] if reads_prompt and task.descriptions else ""

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
    n = len(acc)
    stderr = float(np.std(acc, ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return {"acc": float(np.mean(acc)), "acc_norm": float(np.mean(norm)), "stderr": stderr, "n": n}


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


def summary(tasks: dict[str, dict], seen: dict[str, bool]) -> dict[str, float | None]:
    """AVE (mean of `acc`) and HAR (their harmonic mean) over all tasks, and the means over seen and unseen ones."""

    def mean(names: list[str]) -> float | None:
        return float(np.mean([tasks[name]["acc"] for name in names])) if names else None

    acc = [result["acc"] for result in tasks.values()]
    return {
        "ave": mean(list(tasks)),
        "har": statistics.harmonic_mean(acc) if acc else None,
        "ave_seen": mean([name for name in tasks if seen[name]]),
        "ave_unseen": mean([name for name in tasks if not seen[name]]),
    }
