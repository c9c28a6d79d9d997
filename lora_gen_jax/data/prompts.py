"""Prompts. In: a task, its description, shots. Out: the text the cloud LM reads, or the context of in-context learning.

    system_prompt      description ⏎⏎ query response ⏎⏎ query response …
    few_shot_context   the same ⏎⏎ query, one text in training, scoring and serving

This is lm-evaluation-harness's own few-shot layout, so LoRA-Gen and the in-context baseline read the same shots.
"""

import heapq
from collections.abc import Collection, Sequence

import numpy as np

from lora_gen_jax.data.tasks import Example, Task, stable_hash
from lora_gen_jax.errors import DataError


def sample_shots(
    task: Task, k: int, rng: np.random.Generator, exclude: Collection[Example] = ()
) -> tuple[Example, ...]:
    """`k` training examples of `task`, drawn evenly without replacement; fewer where the task has no more.

    Never one with the same normalized query as an example in `exclude` (those that this prompt will be asked). Raises
    DataError for a negative `k`.
    """
    _check_count(k)
    blocked: set[int] = set()
    for example in exclude:
        blocked.update(task.train_rows_by_key.get(example.query_key, ()))
    # The first k unblocked rows of a random order; as many blocked ones at most can stand before them.
    count = min(len(task.train), k + len(blocked))
    drawn = rng.choice(len(task.train), size=count, replace=False) if count else ()
    return tuple(task.train[int(i)] for i in drawn if int(i) not in blocked)[:k]


def evaluation_shots(task: Task, k: int, seed: int) -> tuple[Example, ...]:
    """The `k` training examples every document of `task` is evaluated with; fewer where the task has no more.

    Fixed by (seed, task name) and the training texts: neither the order of the rows nor the random state
    matters, and the shots for a smaller k are the first of those for a larger one. Queries are all different and
    none is in the test or validation split. Raises DataError for a negative `k`.
    """
    _check_count(k)
    salt = f"{seed}/{task.name}"
    firsts = (rows[0] for key, rows in task.train_rows_by_key.items() if key not in task.held_out_keys)
    # A query asked several times counts once: its twins would otherwise stand side by side in the prompt.
    shots = heapq.nsmallest(k, firsts, key=lambda i: (stable_hash(salt, task.train[i].query_key), i))
    return tuple(task.train[i] for i in shots)


def separator(query: str, response: str) -> str:
    """What stands between a query and its response in plain text: a line break, unless whitespace is there already.

    The reasoning tasks' responses bring their leading space; free-form records do not. Chat tasks have a template.
    """
    return "" if not response or response[0].isspace() or query[-1:].isspace() else "\n"


def shot_text(example: Example) -> str:
    """A shot as plain text: its query and its gold response."""
    return example.query + separator(example.query, example.response) + example.response


def system_prompt(description: str, shots: Sequence[Example] = ()) -> str:
    """The prompt a specialization is generated from: the description and the shots, separated by blank lines.

    With description "" only the shots. Raises DataError where nothing but whitespace would remain.
    """
    prompt = "\n\n".join([*_description(description), *map(shot_text, shots)])
    if not prompt.strip():
        raise DataError(
            "the system prompt is empty", field="description", remedy="give a description, or at least one shot"
        )
    return prompt


def few_shot_context(description: str, shots: Sequence[Example], query: str) -> str:
    """What an edge model reads that reads the prompt: the system prompt and behind it the query (or a `context`).

    Without description and shots only the query. Raises DataError for an empty query.
    """
    return behind(prompt_text(description, shots), query)


def prompt_text(description: str, shots: Sequence[Example]) -> str:
    """The system prompt, and "" without description and shots."""
    return system_prompt(description, shots) if description.strip() or shots else ""


def behind(prompt: str, query: str) -> str:
    """A query behind a prompt, a blank line between them, as one text; behind "" only the query.

    Raises DataError for an empty query.
    """
    if not query.strip():
        raise DataError("the query is empty", field="query")
    return f"{prompt}\n\n{query}" if prompt.strip() else query


def _description(description: str) -> list[str]:
    return [description.strip()] if description.strip() else []


def _check_count(k: int) -> None:
    if k < 0:
        raise DataError(f"the number of shots is {k}; it must be 0 or more", field="k")
