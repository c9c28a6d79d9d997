"""The eight reasoning tasks for lm-evaluation-harness: what its task definitions in ``lm_eval_tasks/`` read.

In: a task's name and where its rows are. Out: splits of documents, "test" to be scored and "shots" in the order in
which they are shown: the first k are the k shots of every document, the same that `eval.py` gives the cloud model.
Any model of lm-eval can run these tasks.
"""

from pathlib import Path
from typing import Any

import datasets

from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.prompts import evaluation_shots
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.errors import ConfigError

# Definitions that lm-eval finds with --include_path.
TASKS = Path(__file__).parent / "lm_eval_tasks"
# How many shots a task has at most.
SHOTS = 256


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
        ConfigError: for a seed that is no whole number.
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
