"""Which part of lm-eval's contexts is the task's prompt, for models that read it once instead of with every document.

In: the contexts of a task, as text. Out: for each the prompt (description and shots) and the query that is left.
Shots must be the same for all documents, which `use_fixed_shots` sees to where a task draws them.
"""

from collections.abc import Sequence
from random import Random
from typing import Any

from lm_eval.api.samplers import SAMPLER_REGISTRY, ContextSampler

from lora_gen_jax.errors import DataError

# What stands between the description, the shots and the query, unless a task says otherwise.
DELIMITER = "\n\n"


def split_contexts(contexts: Sequence[str]) -> dict[str, tuple[str, str]] | None:
    """(prompt, query) of every context; all but a few have the same prompt.

    The prompt is what more than half of the different contexts begin with, up to a blank line. A context that begins
    otherwise (its own document is one of the task's shots, and another stands in for it) is cut after as many blank
    lines. The empty context, which a metric may ask for, has no prompt.

    Returns:
        None where that cannot be told: contexts begin with nothing in common, or there is only one.

    Raises:
        DataError: for a context that has fewer blank lines than others' prompts.
    """
    ordered = sorted(set(contexts) - {""})
    if len(ordered) < 2:
        return None
    half = len(ordered) // 2
    # Among sorted texts, those that begin alike are neighbors: half of them apart, two share what a majority does.
    starts = (_common(one, other) for one, other in zip(ordered, ordered[half:], strict=False))
    blocks = max(starts, key=len).count(DELIMITER)
    if not blocks:
        return None
    found = {"": ("", "")}
    for context in ordered:
        parts = context.split(DELIMITER)
        if len(parts) <= blocks:
            raise DataError(
                f"a context has fewer than the {blocks} blank lines that others' prompts have, so that its query"
                f" cannot be told: {context[:80]!r}",
                field="contexts",
                remedy="use a task whose shots are the same for all documents",
            )
        found[context] = (DELIMITER.join(parts[:blocks]), DELIMITER.join(parts[blocks:]))
    return found


def _common(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


class FixedShots(ContextSampler):
    """Draws the same shots for every document, by lm-eval's seed; where a document is one of them, one more for it."""

    def __init__(self, *args: Any, rnd: int | None = None, **kwargs: Any):
        super().__init__(*args, rnd=rnd, **kwargs)
        self.seed = rnd

    def set_rnd(self, rnd: int | None) -> "FixedShots":
        self.seed = rnd
        return self

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> list[dict[str, Any]]:
        if df:
            self.df = df
        pool = list(self.fewshot_docs())
        order = Random(self.seed).sample(range(len(pool)), min(n + 1, len(pool)))
        shots = [pool[i] for i in order if pool[i] != eval_doc]
        if len(shots) < n:  # the document stands among them more than once
            rest = sorted(set(range(len(pool))) - set(order))
            shots += [pool[i] for i in Random(self.seed).sample(rest, len(rest)) if pool[i] != eval_doc]
        if len(shots) < n:
            problem = f"a task has {len(pool)} documents for shots, too few for {n}"
            raise DataError(problem, field="--num_fewshot", remedy="lower --num_fewshot")
        return shots[:n]


def use_fixed_shots() -> None:
    """From now on tasks of lm-eval that are built in this process show all documents the same shots."""
    SAMPLER_REGISTRY["default"] = FixedShots
