"""Tasks in files: a JSON object each, with descriptions and pairs of input and output."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lora_gen_jax.data.jsonl import read_text
from lora_gen_jax.errors import DataError

from .base import Base, Pair, framed

ROLES = ("a helpful assistant", "an expert on such questions", "a careful assistant", "somebody who answers briefly")


@dataclass(frozen=True)
class TaskFile:
    name: str
    wordings: tuple[str, ...]
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    source: str
    license: str

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    def base(self, seed: int, count: int) -> Base:
        """What is trained on: training pairs alone, and wordings among other sentences where they are one sentence."""
        rng = Random(f"{seed}/{self.name}")
        pairs = list(dict(reversed(self.train)).items())
        rng.shuffle(pairs)
        plain = all("\n" not in wording and "…" not in wording for wording in self.wordings)
        wordings = framed([sentence(w) for w in self.wordings], ROLES, rng) if plain else self.wordings
        return Base(self.name, wordings, tuple(pairs[:count]))


def sentence(text: str) -> str:
    """With a capital at the start and a period at the end, if there is no mark."""
    return text[0].upper() + text[1:] + ("." if text[-1].isalnum() else "")


def read_tasks(folders: Iterable[Path]) -> list[TaskFile]:
    """The tasks of all `*.json` files of the directories. Raises DataError for a malformed file, naming it."""
    tasks: list[TaskFile] = []
    for folder in folders:
        paths = sorted(folder.glob("*.json"))
        if not paths:
            raise DataError(f"{folder} holds no .json file", field="--tasks", remedy="name a directory of task files")
        tasks += map(read_task, paths)
    return tasks


def read_task(path: Path) -> TaskFile:
    try:
        found: dict[str, Any] = json.loads(read_text(path))
        name, wordings = found["name"], tuple(text.strip() for text in found["descriptions"])
        train, test = ([(text.strip(), answer.strip()) for text, answer in found[s]] for s in ("train", "test"))
        task = TaskFile(name, wordings, clean(train), clean(test), found["source"], license_of(found))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f'{path} is not a task file ({type(error).__name__}: {error}); it needs "name" and "source" (texts),'
            ' "license", "descriptions" (texts), "train" and "test" (pairs of input and output)',
            field=path.name,
            code="form",
        ) from error
    if not all(isinstance(text, str) and text for text in (task.source, task.license)):
        raise DataError(f'{path}: "source" and "license" must be texts', field=f"{path.name}:source")
    if "/" not in task.name or not task.wordings or not all(task.wordings) or not task.train:
        wrong = "name" if "/" not in task.name else "train" if task.wordings and all(task.wordings) else "descriptions"
        raise DataError(
            f'{path}: "name" must be GROUP/NAME, "descriptions" and "train" must not be empty',
            field=f"{path.name}:{wrong}",
        )
    return task


def clean(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """The pairs with something in both parts."""
    return tuple((text, answer) for text, answer in pairs if text and answer)


def license_of(found: dict[str, Any]) -> str:
    return found["licence"] if "licence" in found else found["license"]
