"""From what a user has to a system prompt's text, in the layout that generators are trained on (`prompts.py`).

In: a conversation, solved examples, or a JSONL file of many prompts. Out: texts, or `NamedPrompt`s.

    chat     [{"role": "system", "content"}, {"role": "user", "content"}, {"role": "assistant", "content"}, …]
    shots    {"input", "output"} or {"query", "response"}, one a line
    many     {"prompt"}, {"messages": chat}, {"shots": […], "description"} or {"examples": […], "description"}, one a
             line, each with a "name" or without; examples are shots that are learned from, too
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_gen_jax.data.jsonl import Row, map_rows, parsed, read_rows, read_text
from lora_gen_jax.data.prompts import system_prompt
from lora_gen_jax.data.record_rows import GENERIC_SYSTEM, read_turns, text_field
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.errors import DataError

SOURCES = ("prompt", "messages", "shots", "examples")
"""The fields that a prompt may come in; each row has one of them."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PAIRS = (("input", "output"), ("query", "response"))


@dataclass(frozen=True)
class NamedPrompt:
    """A system prompt and the name of its specialization.

    Attributes:
        name: of the specialization.
        text: what is read; only the description, where there are examples.
        examples: that are read as shots, and learned from.
    """

    name: str
    text: str
    examples: tuple[Example, ...] = ()


def chat_prompt(messages: Any) -> str:
    """The system prompt of a conversation: the system text, then its user and assistant turns as shots.

    As in training, a conversation without a system text gets the generic one.

    Args:
        messages: [{"role": "system" | "user" | "assistant", "content": text}, …].

    Raises:
        DataError: naming the message that is malformed, out of turn or empty; when a user's turn is left unanswered;
            when there is neither a system text nor a pair of turns.
    """
    turns = read_turns(messages)
    description = turns.pop(0)[1] if turns[0][0] == "system" else ""
    for i, (role, _) in enumerate(turns):
        place, expected = len(messages) - len(turns) + i, ("user", "assistant")[i % 2]
        if role != expected:
            raise DataError(
                f'message {place + 1} has the role "{role}", expected "{expected}": after the system text, user and'
                " assistant take turns",
                field=f"messages.{place}.role",
                code="turn",
            )
    if len(turns) % 2:
        problem = f"message {len(messages)} is a user's turn without an answer"
        remedy = "leave it out, it is what the specialized edge model is asked later (generate --input)"
        raise DataError(problem, field=f"messages.{len(messages) - 1}", code="unanswered", remedy=remedy)
    if not description.strip() and not turns:
        problem = "the conversation has neither a system text nor a user's turn with its answer"
        raise DataError(problem, field="messages", code="empty", remedy="give either")
    texts = [content for _, content in turns]
    shots = [Example("", query, response) for query, response in zip(texts[::2], texts[1::2], strict=True)]
    return system_prompt(description if description.strip() else GENERIC_SYSTEM, shots)


def solved_rows(rows: Any, what: str) -> list[Example]:
    """The examples of a list of objects with "input" and "output", one of which is called `what`.

    Raises DataError naming the row and the field that is missing, empty or not text; when there are no rows.
    """
    if not isinstance(rows, list) or not rows:
        problem = f'"{what}s" must be a list of at least one object with "input" and "output"'
        raise DataError(problem, field=f"{what}s", code="type")
    examples = []
    for number, row in enumerate(rows, start=1):
        try:
            examples.append(_shot(row))
        except DataError as error:
            raise error.within(f"{what} {number}", f"{what}s.{number - 1}.") from error
    return examples


def prompt_of(row: Row) -> str:
    """The system prompt of an object with one of the fields "prompt", "messages", "shots" and "examples" (the last two
    with "description").

    Raises DataError when it has none or several of them, or what it has is malformed.
    """
    given = [name for name in SOURCES if name in row]
    if len(given) != 1:
        found = " and ".join(f'"{name}"' for name in given) if given else "none"
        problem = f'give exactly one of "prompt", "messages", "shots" and "examples"; found {found}'
        raise DataError(problem, field="prompt", code="count")
    if "description" in row and given[0] not in ("shots", "examples"):
        problem, remedy = '"description" goes with "shots" or "examples" only', f'put it into "{given[0]}"'
        raise DataError(problem, field="description", remedy=remedy)
    if given == ["messages"]:
        return chat_prompt(row["messages"])
    if given == ["prompt"]:
        return text_field(row, "prompt")
    description = text_field(row, "description") if "description" in row else ""
    return system_prompt(description, solved_rows(row[given[0]], given[0][:-1]))


def check_name(name: Any) -> str:
    """A specialization's name, which is also its directory's; DataError when it is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        rule = 'it must be 1 to 64 letters, digits, ".", "_" or "-", the first a letter or digit'
        raise DataError(f'"name" is {str(name)[:80]!r}; {rule}', field="name", code="malformed")
    return name


def read_chat(path: Path) -> str:
    """The system prompt of a JSON file with a conversation: a list of messages, or an object that has "messages", and
    perhaps its system text as "system".

    Raises DataError naming the file, and the line or message.
    """
    value = parsed(path, read_text(path))
    try:
        if not isinstance(value, dict):
            return chat_prompt(value)
        messages, system = value.get("messages"), value.get("system")
        # Some interfaces have the system text beside the turns.
        beside = [{"role": "system", "content": system}] if system else []
        return chat_prompt([*beside, *messages] if isinstance(messages, list) else messages)
    except DataError as error:
        raise error.within(str(path), f"{path.name}:") from error


def read_shots(path: Path, description: str = "") -> str:
    """The system prompt of a JSONL file of `read_examples`, after a description if there is one."""
    return system_prompt(description, read_examples(path))


def read_examples(path: Path) -> list[Example]:
    """The rows of a JSONL file with a solved example a line. Raises DataError naming file, line and field."""
    return map_rows(path, read_rows(path), lambda _, row: _shot(row))


def read_prompts(path: Path) -> list[NamedPrompt]:
    """The prompts of a JSONL file: a row as `prompt_of` reads it, with a "name" or without.

    A row without a name is called by its line, with leading zeros, so that names sort as the lines do; the rows of a
    JSON array on one line are counted instead.

    Raises DataError naming file, line and field; when two rows have the same name, large and small letters alike.
    """
    rows = read_rows(path)
    lines = [line for line, _ in rows]
    # The rows of a JSON array may share a line.
    numbers = lines if len(set(lines)) == len(lines) else list(range(1, len(lines) + 1))
    width, taken = len(str(numbers[-1])), dict[str, int]()

    def named(index: int, row: Row) -> NamedPrompt:
        for field in row:
            if field not in (known := ("name", "description", *SOURCES)):
                problem = f'unknown field "{field}"; a row may have {", ".join(known)}'
                raise DataError(problem, field=field, code="unknown")
        name = f"{numbers[index]:0{width}d}" if row.get("name") is None else check_name(row["name"])
        # Some file systems do not tell large from small letters.
        key = name.lower()
        if key in taken:
            problem = f'"name" {name!r} is taken by line {taken[key]}: names must differ'
            raise DataError(problem, field="name", code="taken")
        taken[key] = lines[index]
        text = prompt_of(row)
        if "examples" not in row:
            return NamedPrompt(name, text)
        return NamedPrompt(name, row.get("description", ""), tuple(solved_rows(row["examples"], "example")))

    return map_rows(path, rows, named)


def _shot(shot: Any) -> Example:
    if not isinstance(shot, dict):
        raise DataError('it must be an object with "input" and "output"', code="type")
    query, response = next((pair for pair in _PAIRS if pair[0] in shot or pair[1] in shot), _PAIRS[0])
    return Example("", text_field(shot, query), text_field(shot, response))
