"""Outputs of a method on agent prompts, written greedily and kept, so that a run that is stopped goes on.

In: an edge model, a `Method`, tasks whose description is the tools' part of a prompt. Out: every row's output, what
the edge read for it, and the time that an answer takes.
"""

import hashlib
import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_gen_jax.data.edge_prompt import continued
from lora_gen_jax.data.prompts import separator
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation import answers
from lora_gen_jax.evaluation.agent import parse
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.task import System
from lora_gen_jax.inference.decode import generate
from lora_gen_jax.models import Model, Pair
from lora_gen_jax.training.portable import flatten

ROWS = 16
"""Outputs that are written at a time."""
SPARE_TOKENS = 8
"""An output may be this much longer than the longest gold one."""
LATENCY_TASKS = 4
"""Tasks of a group whose first answers are timed."""
_OBSERVATION = re.compile(r"^[ \t]*Observation:", re.MULTILINE)


@dataclass(frozen=True)
class Method:
    """What is scored.

    Attributes:
        system: weights for a task, and whether the edge reads the tools.
        shared: the weights are the same for all tasks, so that rows of different tasks are written together.
        identity: digest of everything that the weights for a given prompt depend on.
    """

    system: System
    shared: bool
    identity: str


@dataclass(frozen=True)
class Written:
    """One row.

    Attributes:
        task, document: what was asked.
        context_tokens: that the edge model read.
        text: that it wrote, special tokens left out.
    """

    task: Task
    document: Example
    context_tokens: int
    text: str


def digest_of(*parts: Any) -> str:
    """16 hex digits of texts, numbers and trees of arrays."""
    digest = hashlib.sha256()
    for part in parts:
        for name, leaf in sorted(flatten({"": part} if not isinstance(part, dict) else part), key=lambda pair: pair[0]):
            value = leaf if isinstance(leaf, (str, int, float, bool, type(None))) else np.asarray(leaf)
            plain = not isinstance(value, np.ndarray)
            digest.update(f"{name}{value!r}".encode() if plain else f"{name}{value.shape}{value.dtype}".encode())
            digest.update(b"" if plain else value.tobytes())
    return digest.hexdigest()[:16]


def context_ids(edge: Model, task: Task, document: Example, reads_prompt: bool) -> list[int]:
    """What the edge model reads for a document: its query, behind the task's description where it reads that."""
    query = edge.encoder.pair(document.query, separator(document.query, document.response) + document.response)[0]
    if not reads_prompt:
        return query
    prefix = edge.encoder.prompt(task.descriptions[0])
    return prefix + continued(edge.encoder, prefix, query)


def output_limit(edge: Model, tasks: Sequence[Task]) -> int:
    """Most tokens of an output: those of the longest gold one and a few more."""
    lengths = [len(answers.answer_ids(edge, document)) for task in tasks for document in task.test]
    return max(lengths) + SPARE_TOKENS


def check_lengths(pair: Pair, tasks: Sequence[Task], limit: int, prompt_limit: int) -> None:
    """Every prompt and every context fits its model, before anything is trained or written.

    Raises:
        DataError: naming the document and how many tokens fit.
    """
    room = min(prompt_limit, pair.cloud.config.max_positions - pair.edge.config.num_layers)
    most = pair.edge.config.max_positions - limit
    for task in tasks:
        if (length := len(pair.cloud.encoder.prompt(task.descriptions[0]))) > room:
            raise DataError(
                f"task {task.name}: its tools are {length} cloud tokens, {room} fit: raise eval.prompt_limit, or take a"
                " cloud model with more positions"
            )
        for document in task.test:
            if (length := len(context_ids(pair.edge, task, document, reads_prompt=True))) > most:
                raise DataError(
                    f"{document.id}: with its tools it is {length} edge tokens, {most} fit beside {limit} of output:"
                    " take an edge model with more positions"
                )


class Writer:
    """Writes outputs of one edge model.

    Args:
        edge: the model.
        limit: most tokens of an output.
        cache: of the method; a row is found again by the ids of its prompt and of its context.
    """

    def __init__(self, edge: Model, limit: int, cache: RequestCache):
        self.edge, self.limit, self.cache = edge, limit, cache

    def write(self, method: Method, tasks: Sequence[Task], progress: Callable[[int], None]) -> list[Written]:
        """An output for every test document, in order; `progress` is told how many rows each step has finished."""
        reads = method.system.reads_prompt
        asked = [(task, d, context_ids(self.edge, task, d, reads)) for task in tasks for d in task.test]
        keys = [self._key(task, ids) for task, _, ids in asked]
        order = list(range(len(asked)))
        if method.shared:
            # Rows of similar length together; otherwise a batch has the rows of one task.
            order.sort(key=lambda i: len(asked[i][2]))
            groups = [order]
        else:
            groups = [list(g) for _, g in itertools.groupby(order, key=lambda i: id(asked[i][0]))]
        for group in groups:
            params = None
            for batch in (group[i : i + ROWS] for i in range(0, len(group), ROWS)):
                if any(keys[i] not in self.cache for i in batch):
                    params = method.system.params_for(asked[batch[0]][0]) if params is None else params
                    texts = self._generate(params, [asked[i][2] for i in batch])
                    self.cache.add({keys[i]: text for i, text in zip(batch, texts, strict=True)})
                progress(len(batch))
        return [Written(t, d, len(ids), self.cache[key]) for (t, d, ids), key in zip(asked, keys, strict=True)]

    def _key(self, task: Task, ids: list[int]) -> str:
        return self.cache.key("agent", task.descriptions[0], ids, self.limit)

    def _generate(self, params: Any, contexts: list[list[int]]) -> list[str]:
        end = self.edge.encoder.end
        made = generate(
            self.edge.decoder,
            params,
            contexts,
            max_new_tokens=self.limit,
            stop_ids=[] if end is None else [end],
        )
        return [self.edge.encoder.decode(answer.ids) for answer in made]


def as_read(text: str, gold: str, end: str | None) -> str:
    """The part of an output that an agent loop would read.

    It ends before "Observation:", which the tool writes, unless the gold output has several calls; and before `end`,
    after which a model that reads examples would write the next one.
    """
    text = answers.trimmed(text, end)
    if sum(step.action is not None for step in parse(gold)) > 1:
        return text
    return _OBSERVATION.split(text, maxsplit=1)[0].strip()


def blank_line(tasks: Sequence[Task]) -> str | None:
    """A blank line, where no gold output holds one."""
    return None if any("\n\n" in d.response.strip() for task in tasks for d in task.test) else "\n\n"


def latency(edge: Model, method: Method, tasks: Sequence[Task]) -> float:
    """Milliseconds from a context to its whole output, one at a time: the mean over the first tasks."""
    times = []
    for task in tasks[:LATENCY_TASKS]:
        contexts = [context_ids(edge, task, d, method.system.reads_prompt) for d in task.test]
        times.append(answers.answer_latency(edge, method.system.params_for(task), task.test, contexts))
    return statistics.fmean(times)
