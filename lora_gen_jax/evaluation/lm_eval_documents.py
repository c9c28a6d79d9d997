"""The eight reasoning tasks for lm-evaluation-harness: what its task definitions in ``lm_eval_tasks/`` read.

In: a task's name and where its rows are. Out: splits of documents, "test" to be scored and "shots" in the order in
which they are shown: the first k are the k shots of every document, the same that `eval.py` gives the cloud model.
Any model of lm-eval can run these tasks.

Models that read a task's prompt once instead of with every document need to know which part of a context it is: in go
the contexts of a task, out come for each the prompt (description and shots) and the query that is left. Shots must be
the same for all documents, which `use_fixed_shots` sees to where a task draws them.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import datasets
from lm_eval.api.samplers import SAMPLER_REGISTRY, ContextSampler

from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.prompts import evaluation_shots
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.errors import ConfigError, DataError

# Definitions that lm-eval finds with --include_path.
TASKS = Path(__file__).parent / "lm_eval_tasks"
# How many shots a task has at most.
SHOTS = 256
# What stands between the description, the shots and the query, unless a task says otherwise.
DELIMITER = "\n\n"


def documents(
    task_name: str,
    data_dir: str | None = None,
    tfds_dir: str | None = None,
    shots_seed: int = 0,
    descriptions: bool = False,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """Splits "test" and "shots" of one task; lm-eval passes its ``--metadata`` here.

    Args:
        task_name: one of the eight reasoning tasks.
        data_dir: a directory of original files.
        tfds_dir: where tensorflow-datasets prepared them, without `data_dir`; left out, its default directory.
        shots_seed: of the choice of shots.
        descriptions: begin contexts with the task's description.

    Raises:
        DataError: as `load_tasks`.
        ConfigError: for a seed that is not a whole number.
    """
    if not isinstance(shots_seed, int):
        raise ConfigError(f"metadata shots_seed={shots_seed!r} must be a whole number", field="shots_seed")
    task = load_tasks([task_name], data_dir, tfds_dir)[task_name]
    description = f"{task.descriptions[0]}\n\n" if descriptions else ""
    splits = {"test": task.test, "shots": evaluation_shots(task, SHOTS, shots_seed)}
    return {
        split: datasets.Dataset.from_list([_document(example, description) for example in examples])
        for split, examples in splits.items()
    }


def _document(example: Example, description: str) -> dict[str, Any]:
    """lm-eval puts the delimiting space before a choice itself."""
    partial = bool(example.contexts)
    return {
        "id": example.id,
        "description": description,
        "query": "" if partial else example.query,
        "choices": list(example.contexts) if partial else [option[1:] for option in example.options],
        "gold": example.gold,
        "target": example.response[1:],
    }


def gold_index(document: dict[str, Any]) -> int:
    """What lm-eval takes for the text of a document whose choices are contexts (WinoGrande)."""
    return document["gold"]


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
