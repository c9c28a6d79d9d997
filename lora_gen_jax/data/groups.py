"""Groups: a prompt drawn from the task mixture with queries that none of its shots answers, and rows of prompts.

In: tasks, two encoders and a `DataConfig`. Out: `Group`s of token ids, drawn by a generator of random numbers, in an
order in which consecutive ones fit a row together.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence

import jinja2
import numpy as np

from lora_gen_jax.config import DataConfig
from lora_gen_jax.data.encode import Encoder, shared_row
from lora_gen_jax.data.mixture import chances
from lora_gen_jax.data.prompts import sample_shots, system_prompt
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError, ModelError

log = logging.getLogger(__name__)
_Pair = tuple[list[int], list[int]]
"""Token ids of a query and of its response."""


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt with its queries.

    Attributes:
        description, shots: what the prompt is made of.
        prompt: its token ids.
        queries: token ids of (query, response) pairs, behind `prefix`.
        prefix: what a row of the edge begins with where it reads the prompt, in its ids: the prompt, and what all
            queries begin with alike; else empty.
        task: the task's number among those trained on.
        knowledge: the task is one of `data.knowledge_tasks`.
        edge_prompt: the prompt in the edge model's ids where `data.edge_prompt_length` asks for it, else empty.
        asked: the examples whose queries these are, and more that did not fit a row.
        shot_queries: token ids of the prompt's own shots as queries, where `data.shot_length` asks for them.
    """

    description: str
    shots: tuple[Example, ...]
    prompt: list[int]
    queries: list[tuple[list[int], list[int]]]
    prefix: list[int] = dataclasses.field(default_factory=list)
    task: int = 0
    knowledge: bool = False
    edge_prompt: list[int] = dataclasses.field(default_factory=list)
    asked: tuple[Example, ...] = ()
    shot_queries: list[_Pair] = dataclasses.field(default_factory=list)


class GroupSampler:
    """Draws a task by the mixture's weights, then a wording, shots and queries that are none of the shots.

    Args:
        tasks: whose `split` has examples; others are ignored.
        cloud, edge: encoders of the two models.
        config: shapes and numbers of shots.
        num_meta: meta tokens a prompt is followed by.
        split: "train", or "validation" for queries that training never sees (shots are of train all the same).

    Raises:
        DataError: when no task has an example of the split that fits `query_length`.
        ConfigError: for a weight that is malformed or of an unknown source, or an unknown knowledge task.
        ModelError: for conversations, where the edge model's tokenizer has no chat template, or one without a system
            turn for a prompt that the edge is to read.
    """

    def __init__(
        self, tasks: Sequence[Task], cloud: Encoder, edge: Encoder, config: DataConfig, num_meta: int, split: str
    ):
        self.cloud, self.edge, self.config = cloud, edge, config
        self.num_meta, self.split = num_meta, split
        self.tasks = [task for task in tasks if getattr(task, split)]
        self.numbers = [number for number, task in enumerate(tasks) if getattr(task, split)]
        self.names, self.warned = [task.name for task in tasks], set[str]()
        if not self.tasks:
            problem = f"no task has {split} examples"
            raise DataError(problem, field="data.tasks", remedy="name tasks that do, or give files with data.files")
        self.chats = {number for number, task in enumerate(tasks) if task.chat}
        _check_chat(next((task for task in self.tasks if task.chat), None), edge, config.edge_reads_prompt)
        self.cumulative = np.cumsum(chances(config, tasks, split)[self.numbers])

    def draw(self, rng: np.random.Generator) -> Group:
        """One prompt and at least one query; other tasks are tried where no query fits.

        Raises DataError when nothing fits after many tries.
        """
        for _ in range(100):
            place = int(np.searchsorted(self.cumulative, rng.random(), side="right"))
            place = min(place, len(self.tasks) - 1)
            task = self.tasks[place]
            examples, queries = self._queries(task, rng)
            if not queries:
                continue
            description = task.descriptions[rng.integers(len(task.descriptions))]
            count = int(rng.integers(self.config.min_shots, self.config.max_shots + 1))
            shots = sample_shots(task, count, rng, examples)
            knowledge = not {task.name, task.source}.isdisjoint(self.config.knowledge_tasks)
            number = self.numbers[place]
            group = Group(description, shots, [], queries, task=number, knowledge=knowledge, asked=tuple(examples))
            group = self._fit(group)
            if group is not None:
                return group
        raise DataError(
            "no query with its prompt fits",
            field="data.query_length",
            remedy=f"raise data.query_length ({self.config.query_length}), data.edge_length"
            f" ({self.config.edge_length}), data.response_slots ({self.config.response_slots}) or data.cloud_length"
            f" ({self.config.cloud_length})"
            + f", or data.edge_prompt_length ({self.config.edge_prompt_length})"
            * (self.config.edge_prompt_length > 0),
        )

    def _queries(self, task: Task, rng: np.random.Generator) -> tuple[list[Example], list[_Pair]]:
        c, rows = self.config, getattr(task, self.split)

        def candidates() -> Iterator[tuple[Example, _Pair]]:
            # A few more than needed: the row is filled with those that fit.
            for index in rng.choice(len(rows), size=min(len(rows), 2 * c.queries_per_prompt), replace=False):
                characters = len(rows[index].query) + len(rows[index].response)
                if self.edge.exceeds(characters, c.query_length + 1):  # a large one would be read for seconds
                    continue
                query, response = self._ids(rows[index], task.chat)
                if len(query) + len(response) - 1 <= c.query_length:
                    yield rows[index], (query, response)

        fitting = _fitting(candidates(), c.edge_length, c.response_slots)
        kept = list(itertools.islice(fitting, c.queries_per_prompt))
        return [example for example, _ in kept], [pair for _, pair in kept]

    def _ids(self, example: Example, chat: bool, prompt: str = "") -> tuple[list[int], list[int]]:
        """Ids of a query and of its answer, which ends with the end token where it is learned from."""
        query, response = self.edge.query(example, chat, prompt)
        end = self.edge.end if self.split == "train" else None
        return query, response if end is None else [*response, end]

    def _fit(self, group: Group) -> Group | None:
        if not (group.description.strip() or group.shots):
            return None
        text = system_prompt(group.description, group.shots)
        if fits := not self.cloud.exceeds(len(text), self._limit):
            group = dataclasses.replace(group, prompt=self.cloud.prompt(text))
            fits = len(group.prompt) <= self._limit
        if fits and self.config.edge_reads_prompt:
            # Queries give way before shots do, all but the first.
            pairs = (self._ids(example, group.task in self.chats, text) for example in group.asked)
            prefix, queries = shared_row(pairs, self.config.edge_length, self.config.response_slots)
            fits, group = bool(queries), dataclasses.replace(group, prefix=prefix, queries=queries)
        if fits and self.config.edge_prompt_length:
            group = dataclasses.replace(group, edge_prompt=self.edge.prompt(text))
            fits = len(group.edge_prompt) <= self.config.edge_prompt_length
        if fits and self.config.shot_length:
            shots = ((example, self._ids(example, group.task in self.chats)) for example in group.shots)
            kept = _fitting(shots, self.config.shot_length, self.config.response_slots)
            group = dataclasses.replace(group, shot_queries=[pair for _, pair in kept])
        return group if fits else self.shorten(group)

    def shorten(self, group: Group) -> Group | None:
        """The group with its last shot dropped, and more of them until the prompt fits a row; None without shots."""
        return self._fit(dataclasses.replace(group, shots=group.shots[:-1])) if group.shots else None

    def block(self, seed: Sequence[int], prompts: Sequence[int]) -> list[Group]:
        """The prompts of these numbers, drawn and in the order of `rows`.

        Where long ones meet that fit no row together even without shots, the one that is longest then is drawn anew.

        Raises DataError when nothing fits after many tries.
        """
        groups = [self.draw(np.random.default_rng([*seed, prompt])) for prompt in prompts]
        shortest: list[int] = []
        for again in range(1, 101):
            if (packed := self.rows(groups)) is not None:
                return packed
            shortest = shortest or [self._shortest(group) for group in groups]
            place = int(np.argmax(shortest))
            if sum(sorted(shortest)[: self.config.prompts_per_row - 1]) + shortest[place] > self._limit:
                self._warn(groups[place])
            groups[place] = self.draw(np.random.default_rng([*seed, prompts[place], again]))
            shortest[place] = self._shortest(groups[place])
        raise DataError(
            f"{self.config.prompts_per_row} prompts without shots do not fit data.cloud_length ="
            f" {self.config.cloud_length}",
            field="data.cloud_length",
            remedy="raise it, or lower data.prompts_per_row",
        )

    def rows(self, groups: Sequence[Group]) -> list[Group] | None:
        """The groups in an order in which consecutive ones fit a row together, shots dropped where they must be.

        None when prompts as short as they can be do not fit.
        """
        M = self.config.prompts_per_row
        rows = _balance(groups, M)
        for row in rows:
            while sum(len(group.prompt) for group in row) > self._limit:
                for place in sorted(range(M), key=lambda i: len(row[i].prompt), reverse=True):
                    if (shorter := self.shorten(row[place])) is not None:
                        row[place] = shorter
                        break
                else:
                    return None
        return [group for row in rows for group in row]

    @property
    def _limit(self) -> int:
        """Tokens that the prompts of a row may have together."""
        return self.config.cloud_length - self.config.prompts_per_row * self.num_meta

    def _warn(self, group: Group) -> None:
        """Says once a task that its prompt is too long even beside the shortest others of its block."""
        M, name = self.config.prompts_per_row, self.names[group.task]
        if name not in self.warned:
            self.warned.add(name)
            log.warning(
                "%s: a prompt is too long to share a row with %d others, and others are trained on in its place: raise"
                " data.cloud_length (%d), or lower data.prompts_per_row (%d)",
                *(name, M - 1, self.config.cloud_length, M),
            )

    def _shortest(self, group: Group) -> int:
        """Tokens of the prompt with as few shots as it can have."""
        while (shorter := self.shorten(group)) is not None:
            group = shorter
        return len(group.prompt)


def _check_chat(task: Task | None, edge: Encoder, reads_prompt: bool) -> None:
    """Raises ModelError where the edge model's template cannot say what the edge is to read of a chat."""
    remedy = 'give such rows as "system", "input", "output", or take another edge model'
    if task is None:
        return
    if not edge.tokenizer.chat_template:
        problem = f"the task {task.name!r} has messages, and the edge model's tokenizer no chat template"
        raise ModelError(problem, field="chat_template", remedy=remedy)
    try:
        edge.chat([{"role": "system", "content": "."}] * reads_prompt + [{"role": "user", "content": "."}])
    except jinja2.TemplateError as error:
        raise ModelError(
            f"the task {task.name!r} has messages, and with data.edge_reads_prompt the prompt is their system turn,"
            f" which the edge model's chat template refuses ({error})",
            field="data.edge_reads_prompt",
            remedy=f"leave it out, or {remedy}",
        ) from error


def _fitting(candidates: Iterable[tuple[Example, _Pair]], room: int, slots: int) -> Iterator[tuple[Example, _Pair]]:
    """Those that fit a row of `room` tokens and `slots` answer tokens together; one that does not is passed over."""
    for example, (query, response) in candidates:
        length = len(query) + len(response) - 1
        if length <= room and len(response) <= slots:
            room, slots = room - length, slots - len(response)
            yield example, (query, response)


def _balance(groups: Sequence[Group], per_row: int) -> list[list[Group]]:
    # Rows of even length: the longest prompts are dealt out first, then back and forth.
    order = sorted(groups, key=lambda g: len(g.prompt), reverse=True)
    rows = len(groups) // per_row
    dealt: list[list[Group]] = [[] for _ in range(rows)]
    for i, group in enumerate(order):
        lap, place = divmod(i, rows)
        dealt[place if lap % 2 == 0 else rows - 1 - place].append(group)
    return dealt
