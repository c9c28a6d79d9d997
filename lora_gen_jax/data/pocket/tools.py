"""Tools for the embedded agent tasks.

In: `tables/tools.txt`, `values.txt` and `small_talk.txt`, written for this project. Out: `TOOLS` and their values.
Unseen tools are other verbs over the kinds of input that seen tools take. No request for one tool can be carried out
by another one, so that a request for a tool that is not listed has no right action.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lora_gen_jax.data.pocket.world import table
from lora_gen_jax.data.tasks import stable_hash

_SAME = {"to city": "city", "new thing": "thing", "other number": "number"}
_SHOWS = re.compile(r"\{(.*?)\}")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Tool:
    """A tool the assistant may call.

    Attributes:
        name: what an action calls it; the same in every toolset.
        usage: what it does, as a short phrase.
        arguments: one to three names of `VALUES`, in the order of the action's inputs.
        requests: what a user says; every argument stands in it as "{name}", or, where only an earlier turn names the
            file, as "that picture", "that sound" or "that note".
        returns: the argument it makes a file of ("image"), or "" for tools that make none.
        prerequisite: the tool whose file it works on, or None.
        seen: whether training toolsets may hold it.
    """

    name: str
    usage: str
    arguments: tuple[str, ...]
    requests: tuple[str, ...]
    returns: str
    prerequisite: str | None
    seen: bool


def fill(template: str, values: dict[str, str]) -> str:
    """`template` with every "{name}" replaced by its value."""
    return _SHOWS.sub(lambda match: values[match[1]], template)


def pick(options: Sequence[_Item], *salt: str) -> _Item:
    """The option that the hash of `salt` points at."""
    return options[stable_hash(*salt) % len(options)]


def choose_values(names: Sequence[str], salt: str, given: Mapping[str, str]) -> dict[str, str]:
    """A value for every name, all different; those in `given` stay."""
    values = dict(given)
    for name in names:
        if name not in values:
            values[name] = pick([value for value in VALUES[name] if value not in values.values()], salt, name)
    return values


def small_talk(salt: str) -> tuple[str, str]:
    """Something a user says that needs no tool, and the answer."""
    request, answer = pick(SMALL_TALK, salt, "small talk")
    values = choose_values(_SHOWS.findall(request), salt, {})
    return fill(request, values), fill(answer, values)


def _tool(block: str) -> Tool:
    """Reads one tool: its head line, then its requests."""
    head, requests = block.split("\n", 1)
    name, arguments, usage, *marks = head.split(" | ")
    marked = dict(f"{mark} ".split(" ", 1) for mark in marks)
    return Tool(
        name=name,
        usage=usage,
        arguments=tuple(arguments.split(", ")),
        requests=tuple(map(str.strip, re.split(r"[|\n]", requests))),
        returns=marked.get("gives", "").strip(),
        prerequisite=marked["needs"].strip() if "needs" in marked else None,
        seen="unseen" not in marked,
    )


def _values() -> dict[str, tuple[str, ...]]:
    """All that may stand for an argument, by its name."""
    lines = re.sub(r"\n ", " ", table("values")).splitlines()
    values = {name: tuple(words.split()) for name, words in (line.split(":") for line in lines)}
    stems = [_stem(i) for i in range(96)]
    values["image"] = tuple(f"image/{stem}.png" for stem in stems[:48])
    values["sound"] = tuple(f"sound/{stem}.wav" for stem in stems[48:])
    values["note"] = tuple(f"notes/{name}{i}.txt" for name in values.pop("page") for i in range(1, 8))
    values["time"] = tuple(f"{hour}:{part}" for hour in range(7, 22) for part in ("00", "30"))
    values["count"] = tuple(map(str, range(2, 13)))
    values["degrees"] = tuple(map(str, range(15, 29)))
    values["number"] = tuple(map(str, range(2, 60)))
    values["minutes"] = values["seconds"] = tuple(map(str, range(3, 60)))
    values["start"] = tuple(map(str, range(1, 20)))
    values["end"] = tuple(map(str, range(20, 60)))
    return values | {name: values[same] for name, same in _SAME.items()}


def _stem(index: int) -> str:
    """A short file name such as a1b2: letter, digit, letter, digit."""
    code = stable_hash("stem", str(index))
    letters = "abcdefghkmnprstu"
    return f"{letters[code % 16]}{code // 16 % 10}{letters[code // 160 % 16]}{code // 2560 % 10}"


TOOLS = tuple(map(_tool, re.split(r"\n(?=\S)", table("tools"))))
VALUES = _values()
SMALL_TALK = tuple(tuple(line.split(" | ")) for line in table("small_talk").splitlines())
REFUSALS = ("Sorry, I cannot do that.", "I have no tool for that.", "That is not possible here.")
