"""Outputs of a method on agent prompts, written greedily and kept, so that a run that is stopped goes on.

In: an edge model, a `System`, tasks whose description is the tools' part of a prompt. Out: every row's output, what
the edge read for it, and the time that an answer takes.
"""

import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_gen_jax.config import EvalConfig
from lora_gen_jax.data.prompts import prompt_text
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation import answers
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.request_runner import Runner
from lora_gen_jax.evaluation.subject import EvaluatedModel
from lora_gen_jax.evaluation.task import System
from lora_gen_jax.lab.agent.scores import parse
from lora_gen_jax.models import Model, Pair

SPARE_TOKENS = 8
"""An output may be this much longer than the longest gold one."""
LATENCY_TASKS = 4
"""Tasks of a group whose first answers are timed."""
_OBSERVATION = re.compile(r"^[ \t]*Observation:", re.MULTILINE)


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


def context_ids(edge: Model, task: Task, document: Example, reads_prompt: bool) -> list[int]:
    """What the edge model reads for a document: its query, after the task's description where it reads that."""
    return edge.encoder.query(document, False, prompt_text(task.descriptions[0], ()) if reads_prompt else "")[0]


def output_limit(edge: Model, tasks: Sequence[Task]) -> int:
    """Most tokens of an output: those of the longest gold one and a few more."""
    lengths = [len(answers.answer_ids(edge, document)) for task in tasks for document in task.test]
    return max(lengths) + SPARE_TOKENS


def check_lengths(pair: Pair, tasks: Sequence[Task], limit: int, prompt_limit: int, reads_prompt: bool = True) -> None:
    """Every prompt and every context fits its model, before anything is trained or written.

    Args:
        pair: of models.
        tasks: with test documents.
        limit: most tokens of an output.
        prompt_limit: most tokens of a prompt for the cloud model.
        reads_prompt: some method's edge model reads the tools.
    """
    room = pair.prompt_room(prompt_limit)
    most = pair.edge.config.max_positions - limit
    for task in tasks:
        if (length := len(pair.cloud.encoder.prompt(task.descriptions[0]))) > room:
            problem = f"task {task.name}: its tools are {length} cloud tokens, {room} fit"
            remedy = "raise eval.prompt_limit, or take a cloud model with more positions"
            raise DataError(problem, field="eval.prompt_limit", remedy=remedy)
        for document in task.test:
            if (length := len(context_ids(pair.edge, task, document, reads_prompt))) > most:
                what = "with its tools it" if reads_prompt else "it"
                problem = f"{document.id}: {what} is {length} edge tokens, {most} fit beside {limit} of output"
                remedy = "take an edge model with more positions, or methods that do not read the tools"
                raise DataError(problem, field=document.id, remedy=remedy)


class Writer:
    """Writes outputs of one edge model.

    Args:
        edge: the model.
        limit: most tokens of an output.
        journal: where outputs are kept, by what was asked of which weights.
    """

    def __init__(self, edge: Model, limit: int, journal: RequestCache):
        self.edge, self.limit, self.journal = edge, limit, journal

    def write(self, system: System, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> list[Written]:
        """An output for every test document, in order; `progress` is told how many rows of how many are finished."""
        reads = system.reads_prompt
        asked = [(task, d, context_ids(self.edge, task, d, reads)) for task in tasks for d in task.test]
        # Rows of different tasks are written together where the weights are the same.
        by_task = itertools.groupby(asked, key=lambda row: id(row[0]))
        groups = [asked] if not system.depends_on_prompt else [list(rows) for _, rows in by_task]
        written: list[Written] = []
        for group in groups:
            task, before = group[0][0], len(written)
            assert system.identity_for is not None
            subject = EvaluatedModel(
                system.identity_for(task), self.edge, lambda task=task: system.specialized_for(task)
            )
            runner = Runner(
                subject,
                self.journal,
                EvalConfig().batch_tokens,
                lambda done, _, before=before: progress(before + done, len(asked)),
            )
            end = self.edge.encoder.end
            made = runner.tokens([tuple(ids) for _, _, ids in group], self.limit, [] if end is None else [end])
            texts = map(self.edge.encoder.decode, made)
            written += [Written(t, d, len(ids), text) for (t, d, ids), text in zip(group, texts, strict=True)]
            progress(len(written), len(asked))
        return written


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


def latency(edge: Model, system: System, tasks: Sequence[Task]) -> float:
    """Milliseconds from a context to its whole output, one at a time: the mean over the first tasks."""
    times = []
    for task in tasks[:LATENCY_TASKS]:
        contexts = [context_ids(edge, task, d, system.reads_prompt) for d in task.test]
        model = EvaluatedModel("", edge, lambda task=task: system.specialized_for(task)).model
        times.append(answers.answer_latency(edge, model, task.test, contexts))
    return statistics.fmean(times)
