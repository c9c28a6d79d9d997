"""Scoring a task: with the base model, with shots, and specialised.

In: an edge model, a task and a `System`. Out: `acc`, its standard error, the number of documents, tokens in the edge's
context and latency; AVE and HAR over tasks. The shots are the same for all documents of a task, for the cloud and for
in-context learning. Documents with options are scored by log-likelihood, others by their generated answer.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from lora_gen_jax.config import EvalConfig
from lora_gen_jax.data.prompts import evaluation_shots, system_prompt
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation import answers, choices
from lora_gen_jax.evaluation.standard_error import standard_error
from lora_gen_jax.models import Model


@dataclasses.dataclass(frozen=True)
class System:
    """What is scored: a method's weights for a task, and whether the edge reads the prompt.

    Attributes:
        params_for: from a task to the edge model's weights.
        reads_prompt: the edge model reads the system prompt before every query (in-context learning).
    """

    params_for: Callable[[Task], Any]
    reads_prompt: bool = False


def evaluate_task(edge: Model, task: Task, system: System, settings: EvalConfig, progress: Any = None) -> dict:
    """Scores one task.

    Raises:
        DataError: as `scored_documents`.
    """
    documents = scored_documents(task, settings)
    shots = evaluation_shots(task, settings.shots, settings.seed) if system.reads_prompt else ()
    description = task.descriptions[0] if system.reads_prompt and task.descriptions else ""
    params = system.params_for(task)
    if documents[0].options:
        requests = choices.build_requests(edge, documents, description, shots)
        scores = choices.run(edge, params, requests, settings, share_prefix=system.reads_prompt, progress=progress)
        result = choices.metrics(documents, choices.regroup(documents, scores))
        contexts = [request.context for request in requests]
        latency = choices.latency(edge, params, requests[: choices.LATENCY_DOCUMENTS], settings)
    else:
        contexts = answers.contexts(edge, documents, description, shots)
        result = exact_match(answers.exact_matches(edge, params, documents, contexts))
        latency = answers.answer_latency(edge, params, documents, contexts)
        if progress is not None:
            progress(len(documents), len(documents))
    result["context_tokens"] = round(statistics.fmean(map(len, contexts)), 1)
    return result | {"latency_ms": round(latency, 2)}


def scored_documents(task: Task, settings: EvalConfig) -> list[Example]:
    """The test documents that are scored.

    Raises:
        DataError: when there are none, when some have options and some have none, or when they are chats.
    """
    documents = list(task.test[: settings.limit])
    if not documents:
        raise DataError(f"task {task.name} has no test documents: give it a test split")
    for document in documents:
        if bool(document.options) != bool(documents[0].options):
            raise DataError(
                f"task {task.name}, document {document.id}: give all documents options to choose from, or none"
            )
    if task.chat and not documents[0].options:
        raise DataError(f"task {task.name}: free-form chats cannot be scored; give plain inputs, or options")
    return documents


def exact_match(right: list[bool]) -> dict:
    """`acc` is the share of exact answers, `acc_norm` the same; the error as lm-eval's."""
    acc = float(np.mean(right))
    return {"acc": acc, "acc_norm": acc, "stderr": standard_error(right), "n": len(right)}


def task_prompt(task: Task, settings: EvalConfig) -> str | None:
    """The task's system prompt: its description and the fixed shots; None where it has neither."""
    shots = evaluation_shots(task, settings.shots, settings.seed)
    description = task.descriptions[0] if task.descriptions else ""
    return system_prompt(description, shots) if description.strip() or shots else None


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
