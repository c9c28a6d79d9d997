"""Prompts that LoRA-Gen is asked under beside a task's own: what the prompt says should decide, its wording should not.

In: a task, the others that are scored, the settings. Out: the prompt of each control.

    paraphrase     another wording of the description, where the task has one
    description    no shots
    shots          no description
    shuffled       another task's prompt
    gibberish      random tokens, as many as the task's own prompt has
    empty          nothing: the line break alone that every prompt ends with
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lora_gen_jax.config import EvalConfig
from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.data.tasks import Task, stable_hash
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.task import task_prompt
from lora_gen_jax.methods.method import Prompt

CONTROLS = {
    "paraphrase": "LoRA-Gen, another wording",
    "description": "LoRA-Gen, only the description",
    "shots": "LoRA-Gen, only the shots",
    "shuffled": "LoRA-Gen, another task's prompt",
    "gibberish": "LoRA-Gen, random tokens",
    "empty": "LoRA-Gen, an empty prompt",
}
"""Each with its title in tables."""


def check_controls(names: Sequence[str], tasks: Sequence[Task]) -> None:
    """Raises ConfigError for a control that the tasks have nothing for."""
    if "shuffled" in names and len(tasks) < 2:
        remedy = "score at least two tasks"
        raise ConfigError("method shuffled takes the prompt of another task", field="eval.tasks", remedy=remedy)
    if "paraphrase" in names and all(len(task.descriptions) < 2 for task in tasks):
        problem = "method paraphrase takes a task's second description, and no task has two"
        raise ConfigError(problem, field="eval.methods", remedy="leave it out")


def prompts_under(
    control: str, tasks: Sequence[Task], settings: EvalConfig, encoder: Encoder
) -> Callable[[Task], Prompt | None]:
    """From a task to its prompt under a control; None where nothing is left of it.

    Args:
        control: one of `CONTROLS`.
        tasks: that are scored.
        settings: eval.shots and eval.seed.
        encoder: of the cloud model, for the length of gibberish.
    """
    others = another_task(tasks) if control == "shuffled" else {}

    def prompt(task: Task) -> Prompt | None:
        if control == "empty":
            return Prompt("", (), task.chat)
        if control == "gibberish":
            own = task_prompt(task, settings)
            return own and Prompt(gibberish(encoder, own.text, f"{settings.seed}/{task.name}"), (), task.chat)
        if control == "shuffled":
            return task_prompt(others[id(task)], settings)
        parts = {
            "paraphrase": {"descriptions": task.descriptions[1:] or task.descriptions},
            "description": {"train": ()},
            "shots": {"descriptions": ()},
        }
        return task_prompt(dataclasses.replace(task, **parts[control]), settings)

    return prompt


def another_task(tasks: Sequence[Task]) -> dict[int, Task]:
    """For each task's `id` the task whose prompt it gets: of another source where there is one, else the next.

    Tasks of one source may be variants of each other, and then the other's prompt is as good as their own.
    """
    found, before = {}, dict[str, int]()
    for i, task in enumerate(tasks):
        rest = [*tasks[i + 1 :], *tasks[:i]]
        foreign = [other for other in rest if other.source != task.source]
        number = before.get(task.source, 0)
        before[task.source] = number + 1
        found[id(task)] = foreign[number % len(foreign)] if foreign else rest[0]
    return found


def gibberish(encoder: Encoder, text: str, seed: str) -> str:
    """Random tokens as a text, as many as `text` has; the same for the same seed."""
    rng = np.random.default_rng(stable_hash("gibberish", seed))
    length, made, most = len(encoder.prompt(text)), "", encoder.vocab_size
    missing = length
    while missing:
        # A piece that would be too long, or that the tokenizer would read as more tokens than it was made of, is
        # drawn again, and a shorter one.
        longer = made + encoder.decode(rng.integers(0, min(len(encoder.tokenizer), most), missing).tolist())
        left = length - len(encoder.prompt(longer)) if longer.strip() else length
        made, missing = (longer, left) if left >= 0 else (made, max(1, missing // 2))
    return made
