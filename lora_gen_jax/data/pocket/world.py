"""A small world of things: the facts behind the embedded tasks.

In: `tables/world.txt` (things and what is true of them) and `tables/asked.txt` (ways to ask for it), written for this
project. Out: `ATTRIBUTES`: for each attribute, what it says of which things. Several attributes hold of every thing
("owl": owlet, hoot, barn, bird, feathers, owls, O, animal), so that a query by itself says nothing about the task; the
system prompt does.
"""

import dataclasses
import re
from importlib.resources import files


@dataclasses.dataclass(frozen=True, eq=False)
class Attribute:
    """A relation between a thing and a word.

    Attributes:
        name: short name, part of a task's name.
        values: from thing to word.
        phrases: ways to say what is asked for, to follow "give"; the more of them, the more prompts are understood.
        questions: the same as whole questions.
    """

    name: str
    values: dict[str, str]
    phrases: tuple[str, ...]
    questions: tuple[str, ...]


def table(name: str) -> str:
    """The text of a file of `tables/`."""
    return (files("lora_gen_jax.data.pocket") / "tables" / f"{name}.txt").read_text(encoding="utf-8").strip()


def _kinds() -> dict[str, dict[str, dict[str, str]]]:
    """{kind: {thing: {attribute: word}}}; a block's first line names its kind and its columns."""
    kinds = {}
    for block in table("world").split("\n\n"):
        head, *rows = block.splitlines()
        kind, _, columns = head.partition(": ")
        words = [row.split() for row in rows]
        kinds[kind] = {thing: dict(zip(columns.split(), rest, strict=True)) for thing, *rest in words}
    return kinds


def _values() -> dict[str, dict[str, str]]:
    """What each attribute says of which things."""
    values: dict[str, dict[str, str]] = {}
    for things in _KINDS.values():
        for thing, words in things.items():
            for attribute, word in words.items():
                values.setdefault(attribute, {})[thing] = word
    values["kind"] = {thing: kind for kind, things in _KINDS.items() for thing in things}
    values["initial"] = {thing: thing[0].upper() for thing in THINGS}
    return values


def _asked() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """{attribute: (phrases, questions)}; each list ends with a semicolon, and lines break anywhere."""
    found = {}
    for block in re.split(r"\n(?=\S)", table("asked")):
        name, *lines = block.splitlines()
        asked = [part.strip() for part in " ".join(line.strip() for line in lines).split(";") if part.strip()]
        questions = tuple(part for part in asked if part.endswith("?"))
        found[name] = (tuple(part for part in asked if part not in questions), questions)
    return found


_KINDS = _kinds()
THINGS = tuple(thing for things in _KINDS.values() for thing in things)
_VALUES = _values()
ATTRIBUTES = tuple(Attribute(name, _VALUES[name], *asked) for name, asked in _asked().items())
