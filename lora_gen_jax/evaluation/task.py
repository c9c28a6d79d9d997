"""Scoring a task: with the base model, with shots, and specialized.

In: an edge model, a task and a `System`. Out: `acc`, its standard error, the number of documents, tokens in the edge's
context and latency; `rouge_l` of long answers. The shots are the same for all documents of a task, for the cloud and
for in-context learning. Documents with options are scored by log-likelihood, others by their generated answer.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from lora_gen_jax.config import EvalConfig
from lora_gen_jax.data.prompts import evaluation_shots, system_prompt
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation import answers, choices
from lora_gen_jax.evaluation.means import standard_error
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.request_runner import Runner
from lora_gen_jax.evaluation.subject import EvaluatedModel
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.prefix import soft_positions
from lora_gen_jax.methods.method import Prompt
from lora_gen_jax.models import Model, Pair

# Training rows beside the shots that a method may ask the prompted edge model.
FURTHER_QUERIES = 8

# Documents, and the description and shots that the edge model reads before each.
Asked = tuple[list[Example], str, tuple[Example, ...]]


@dataclasses.dataclass(frozen=True)
class System:
    """What is scored: what a method makes of the edge model for a task, and whether the edge reads the prompt.

    Attributes:
        specialized_for: from a task to what answers its queries.
        reads_prompt: the edge model reads the system prompt before every query (in-context learning).
        identity_for: from a task to hex digits of everything that this depends on, without making it; None
            where results are not kept.
        depends_on_prompt: what answers differs from prompt to prompt.
        soft_tokens: that stand before every query.
        cloud_reads: the cloud model reads the prompt.
    """

    specialized_for: Callable[[Task], EdgeModel]
    reads_prompt: bool = False
    identity_for: Callable[[Task], str] | None = None
    depends_on_prompt: bool = False
    soft_tokens: int = 0
    cloud_reads: bool = False

    @property
    def prompted(self) -> bool:
        """Whether the prompt, and so the number of shots, makes a difference."""
        return self.reads_prompt or self.depends_on_prompt


def evaluate_task(
    edge: Model,
    task: Task,
    system: System,
    settings: EvalConfig,
    journal: RequestCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Scores one task.

    Args:
        edge: the model; `system` has its weights.
        task, system, settings: these.
        journal: where finished requests and tasks are kept, for an evaluation that goes on where it was stopped.
        progress: called with the number of finished requests and their total.
    """
    documents, description, shots = asked_of(task, system, settings)
    keeps = journal is not None and system.identity_for is not None
    identity = system.identity_for(task) if system.identity_for is not None and keeps else ""
    subject = EvaluatedModel(identity, edge, lambda: system.specialized_for(task), soft_tokens=system.soft_tokens)
    cache = journal if journal is not None and keeps else RequestCache(None, "")
    runner = Runner(subject, cache, settings.batch_tokens, progress or (lambda done, total: None))
    texts = [(d.id, d.query, d.response, d.options, d.contexts) for d in documents]
    # Latency is part of the result, so the device is part of the key.
    device = jax.devices()[0].device_kind
    asked = (texts, description, [(s.query, s.response) for s in shots])
    whole = runner.key("task", device if settings.latency else "untimed", task.name, *asked)
    if whole not in cache:
        score = score_options if documents[0].options else score_answers
        cache.add({whole: score(edge, runner, (documents, description, shots), settings)})
    return cache[whole]


def asked_of(task: Task, system: System, settings: EvalConfig) -> Asked:
    """What the edge model of a system reads: the documents, and a prompt where it reads one."""
    documents = scored_documents(task, settings)
    if not system.reads_prompt:
        return documents, "", ()
    description = task.descriptions[0] if task.descriptions else ""
    return documents, description, evaluation_shots(task, settings.shots, settings.seed)


def score_options(edge: Model, runner: Runner, asked: Asked, settings: EvalConfig) -> dict:
    """Documents with options, by log-likelihood."""
    pairs = choices.pairs_of(edge, *asked)
    result = choices.metrics(asked[0], choices.logprobs(runner, pairs))
    # Options that stand in the context make one context each.
    contexts = [context for pair in pairs for context in dict.fromkeys(context for context, _ in pair)]
    model = runner.subject.model
    latency_ms = choices.latency(model, pairs, settings) if settings.latency else None
    return result | figures(runner.subject, contexts, latency_ms)


def score_answers(edge: Model, runner: Runner, asked: Asked, settings: EvalConfig) -> dict:
    """Documents without options, by their generated answer."""
    documents = asked[0]
    contexts = answers.contexts(edge, *asked)
    texts = answers.answered(runner, documents, contexts)
    result = exact_match([text == d.response.strip() for text, d in zip(texts, documents, strict=True)])
    if answers.long(documents):
        gold = [document.response for document in documents]
        result["rouge_l"] = statistics.fmean(map(answers.rouge_l, texts, gold))
    model = runner.subject.model
    latency_ms = answers.answer_latency(edge, model, documents, contexts) if settings.latency else None
    return result | figures(runner.subject, contexts, latency_ms)


def figures(
    subject: EvaluatedModel, contexts: Sequence[Sequence[int]], latency_ms: float | None
) -> dict[str, float | None]:
    """Mean tokens of the edge's context, soft ones included, and latency; None where it was not measured."""
    read = statistics.fmean(min(len(one), subject.room) for one in contexts)
    return {
        "context_tokens": round(subject.soft_tokens + read, 1),
        "latency_ms": None if latency_ms is None else round(latency_ms, 2),
    }


def scored_documents(task: Task, settings: EvalConfig) -> list[Example]:
    """The test documents that are scored.

    Raises DataError when there are none, when some have options and some have none, or when the task is a chat.
    """
    documents = list(task.test[: settings.limit])
    if not documents:
        problem = f"task {task.name} has no {settings.split} documents"
        raise DataError(problem, field="eval.split", code="empty", remedy=f"give it a {settings.split} split")
    for document in documents:
        if bool(document.options) != bool(documents[0].options):
            raise DataError(
                f"task {task.name}: document {document.id} has options and the first has none, or the other way round",
                field=document.id,
                remedy="give all documents options to choose from, or none",
            )
    if task.chat:
        remedy = 'give "system" and "input" instead of "messages"'
        raise DataError(f"task {task.name}: chats cannot be scored", field=task.name, remedy=remedy)
    return documents


def exact_match(right: list[bool]) -> dict:
    """`acc` is the share of exact answers, `acc_norm` the same; the error as lm-eval's."""
    acc = float(np.mean(right))
    return {"acc": acc, "acc_norm": acc, "stderr": standard_error(right), "n": len(right)}


def task_prompt(task: Task, settings: EvalConfig) -> Prompt | None:
    """The task's system prompt: its description and the fixed shots; None where it has neither."""
    rows = evaluation_shots(task, settings.shots + FURTHER_QUERIES, settings.seed)
    shots, queries = rows[: settings.shots], rows[settings.shots :]
    description = task.descriptions[0] if task.descriptions else ""
    if not (description.strip() or shots):
        return None
    return Prompt(system_prompt(description, shots), shots, task.chat, queries)


def check_lengths(pair: Pair, systems: Mapping[str, System], tasks: Sequence[Task], settings: EvalConfig) -> None:
    """All that is scored fits its model: prompts for the cloud, and free-form documents with their answers.

    Documents with options are cut from the left where they are too long, as in lm-eval.

    Raises DataError naming the task or the document, and how many tokens fit.
    """
    room = pair.prompt_room(settings.prompt_limit)
    for task in tasks:
        prompt = task_prompt(task, settings) if any(system.cloud_reads for system in systems.values()) else None
        if prompt is not None and (length := len(pair.cloud.encoder.prompt(prompt.text))) > room:
            raise DataError(
                f"task {task.name}: its prompt with {len(prompt.shots)} shots is {length} cloud tokens, {room} fit",
                field="eval.prompt_limit",
                remedy="lower eval.shots, raise eval.prompt_limit, or take a cloud model with more positions",
            )
        if not scored_documents(task, settings)[0].options:
            for name, system in systems.items():
                check_answers(pair.edge, task, (name, system), settings)


def check_answers(edge: Model, task: Task, named: tuple[str, System], settings: EvalConfig) -> None:
    """Every context of a task without options leaves a system room for the longest answer."""
    name, system = named
    documents, description, shots = asked_of(task, system, settings)
    soft = soft_positions(edge.config, system.soft_tokens)
    room = edge.config.max_positions - soft - answers.answer_limit(edge, documents)
    for document, context in zip(documents, answers.contexts(edge, documents, description, shots), strict=True):
        if len(context) > room:
            raise DataError(
                f"task {task.name}, document {document.id}: for method {name} it is {len(context)} edge tokens,"
                f" {room} fit beside the longest answer",
                field=document.id,
                remedy="shorten it, lower eval.shots, or take a model with more positions",
            )
