"""Which part of lm-eval's contexts is the task's prompt, for models that read it once instead of with every document.

In: the contexts of a task, as text. Out: for each the prompt (description and shots) and the query that is left.
Shots must be the same for all documents, which `fixed_shots` sees to where a task draws them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

from lm_eval.api.samplers import SAMPLER_REGISTRY, ContextSampler

from lora_gen_jax.errors import DataError

# What stands between the description, the shots and the query, unless a task says otherwise.
DELIMITER = "\n\n"


def split_contexts(task: str, contexts: Sequence[str]) -> list[tuple[str, str]]:
    """(prompt, query) of every context; all but a few have the same prompt.

    The prompt is what more than half of the contexts begin with, up to a blank line. A context that begins otherwise
    (its own document is one of the task's shots, and another stands in for it) is cut after as many blank lines.

    Args:
        task: its name, for errors.
        contexts: at least one.

    Raises:
        DataError: where contexts share no text that ends with a blank line.
    """
    ordered = sorted(contexts)
    half = len(ordered) // 2
    # Among sorted texts, those that begin alike are neighbours: half of them apart, two share what a majority does.
    starts = (_common(one, other) for one, other in zip(ordered, ordered[half:], strict=False))
    longest = max(starts, key=len)
    blocks = longest.count(DELIMITER)
    if not blocks:
        raise DataError(
            f"the contexts of task {task} do not begin with a prompt of their own: give --num_fewshot K with shots that"
            " are the same for all documents, or a task with a description"
        )
    found = []
    for context in contexts:
        parts = context.split(DELIMITER)
        if len(parts) <= blocks:
            raise DataError(
                f"task {task}: a context has fewer than the {blocks} blank lines that others' prompts have, so that its"
                " query cannot be told: use a task whose shots are the same for all documents"
            )
        found.append((DELIMITER.join(parts[:blocks]), DELIMITER.join(parts[blocks:])))
    return found


def _common(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


class FixedShots(ContextSampler):
    """Draws the same shots for every document; where a document is one of them, one more is drawn for it."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> list[dict[str, Any]]:
        if df:
            self.df = df
        pool = list(self.fewshot_docs())
        order = Random(0).sample(range(len(pool)), min(n + 1, len(pool)))
        shots = [pool[i] for i in order if pool[i] != eval_doc]
        if len(shots) < n:
            raise DataError(
                f"a task has {len(pool)} documents to draw shots from, too few for {n}: lower --num_fewshot"
            )
        return shots[:n]


@contextmanager
def fixed_shots() -> Iterator[None]:
    """Tasks of lm-eval that are built inside the block show all documents the same shots."""
    before = SAMPLER_REGISTRY["default"]
    SAMPLER_REGISTRY["default"] = FixedShots
    try:
        yield
    finally:
        SAMPLER_REGISTRY["default"] = before
