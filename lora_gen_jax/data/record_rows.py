"""One row of the user's data. In: a JSON object (forms in `records.py`). Out: its example, system text and split.

Every function raises DataError that says what is wrong; the caller adds file and line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_gen_jax.data.jsonl import Row
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.errors import DataError

GENERIC_SYSTEM = "You receive a request. Carry it out accurately and completely, and reply with the result alone."
"""The description of rows that bring no system text."""
SPLITS = ("train", "validation", "test")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Record:
    """A parsed row; `task` and `split` are None where the row does not say."""

    example: Example
    system: str
    chat: bool
    task: str | None
    split: str | None


def parse_record(row: Row, example_id: str) -> Record:
    """Reads a row of any of the three forms. Raises DataError (see `records.load_records`)."""
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise DataError(f'"split" is {split!r}; it must be one of {", ".join(SPLITS)}', field="split")
    task = None if row.get("task") is None else text_field(row, "task")
    chat, turns = "messages" in row, tuple[tuple[str, str], ...]()
    if chat:
        system, turns, output = _messages(row)
        query = _conversation(turns)
    else:
        system, query, output = _plain(row)
    if "options" in row:
        example = _multiple_choice(row, example_id, query, chat)
        if output is not None and output.strip() != example.response.strip():
            raise DataError("the output is not the option that is marked as gold", field="output", code="mismatch")
    elif output is None:
        raise DataError('the field "output" is missing', field="output", code="missing")
    else:
        example = Example(example_id, query, output)
    if len(turns) > 1:
        example = replace(example, turns=turns)
    return Record(example, system, chat, task, split)


def _plain(row: Row) -> tuple[str, str, str | None]:
    """(system, query, output) of a row without messages; the output may be left out where options are given."""
    if not {"instruction", "system", "input"} & row.keys():
        problem = 'a row needs "system", "input", "output"; or "messages"; or "instruction", "output"'
        raise DataError(problem, field="system", code="form")
    output = None if "options" in row and "output" not in row else text_field(row, "output")
    if "instruction" not in row:
        return text_field(row, "system"), text_field(row, "input"), output
    instruction, system = text_field(row, "instruction"), _system(row)
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise DataError(f'"input" must be text, found {type(given).__name__}', field="input", code="type")
    if given and given.strip():
        return instruction if system is None else f"{system}\n\n{instruction}", given, output
    # Alpaca's rows without an input: the instruction itself is what is asked.
    return GENERIC_SYSTEM if system is None else system, instruction, output


def _system(row: Row) -> str | None:
    """The system text that stands beside an instruction or messages; None where there is none, or an empty one."""
    return None if row.get("system", "") == "" else text_field(row, "system")


def read_turns(messages: Any) -> list[tuple[str, str]]:
    """(role, content) of a conversation's messages; the first may be a system text, the only one that may be empty."""
    if not isinstance(messages, list) or not messages:
        raise DataError('"messages" must be a list of objects with "role" and "content"', field="messages", code="type")
    turns: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        try:
            turns.append(_turn(message, first=i == 0))
        except DataError as error:
            raise error.within(f"message {i + 1}", f"messages.{i}.") from error
    return turns


def _turn(message: Any, first: bool) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise DataError('it must be an object with "role" and "content"', code="type")
    role = message.get("role")
    if role not in _ROLES:
        raise DataError(f'"role" is {role!r}; it must be "system", "user" or "assistant"', field="role", code="unknown")
    if role == "system" and not first:
        raise DataError('only the first message may have the role "system"', field="role", code="order")
    return role, "" if role == "system" and message.get("content") == "" else text_field(message, "content")


def _messages(row: Row) -> tuple[str, tuple[tuple[str, str], ...], str | None]:
    """(system, turns that are asked, last assistant turn); with options the conversation may end at the user's turn."""
    turns, beside = read_turns(row["messages"]), _system(row)
    if beside is not None and turns[0][0] == "system":
        problem = 'the system text is given twice: as "system" and as the first message'
        raise DataError(problem, field="system", code="repeated", remedy="leave one out")
    system = (turns.pop(0)[1] if turns[0][0] == "system" else beside) or GENERIC_SYSTEM
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=None)
    if last is None and "options" not in row:
        raise DataError("no assistant turn, so there is no response to learn", field="messages", code="no response")
    if last is not None and last < len(turns) - 1:
        problem = "the last message must be the assistant's: a user turn after it has no response"
        raise DataError(problem, field="messages", code="order")
    asked = turns if last is None else turns[:last]
    if not asked or asked[-1][0] != "user":
        raise DataError("a user turn must come right before the last assistant turn", field="messages", code="no query")
    return system, tuple(asked), None if last is None else turns[last][1]


def _conversation(turns: Sequence[tuple[str, str]]) -> str:
    """One user turn as it is; of several turns a transcript, since a shot is one text."""
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join(f"{role.capitalize()}: {content}" for role, content in turns)


def _multiple_choice(row: Row, example_id: str, query: str, chat: bool) -> Example:
    options = row["options"]
    if not isinstance(options, list) or len(options) < 2:
        raise DataError('"options" must be a list of at least two texts', field="options", code="type")
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise DataError('every entry of "options" must be text and not empty', field="options", code="empty")
    if len(set(options)) < len(options):
        raise DataError('"options" holds the same text twice', field="options", code="repeated")
    gold = _gold(row, options)
    # As in lm-evaluation-harness: " " between query and option, and none after a chat template.
    delimiter = "" if chat or query[-1].isspace() else " "
    texts = tuple(option if option[0].isspace() else delimiter + option for option in options)
    return Example(example_id, query, texts[gold], texts, gold, option_lengths=tuple(map(len, options)))


def _gold(row: Row, options: list[str]) -> int:
    """The index of the right option, from "gold" (an index) or "answer" (an option's text, letter or index)."""
    if "gold" not in row and "answer" not in row:
        problem = '"options" needs "gold" (an index from 0) or "answer" (an option\'s text or letter)'
        raise DataError(problem, field="gold", code="missing")
    name = "gold" if "gold" in row else "answer"
    value = row[name]
    if name == "answer" and isinstance(value, str):
        if value in options:
            return options.index(value)
        value = ord(value) - ord("A") if len(value) == 1 else None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(options):
        raise DataError(
            f'"{name}" is {row[name]!r}, which is none of the {len(options)} options', field=name, code="range"
        )
    return value


def text_field(row: Row, name: str) -> str:
    """A field of an object that must be text with more than whitespace in it; else a DataError that names it."""
    if name not in row:
        raise DataError(f'the field "{name}" is missing', field=name, code="missing")
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f'"{name}" must be text, found {type(value).__name__}', field=name, code="type")
    if not value.strip():
        raise DataError(f'"{name}" is empty', field=name, code="empty")
    check_text(value, name)
    return value


def check_text(text: str, field: str) -> None:
    """JSON and command lines can hold half of a surrogate pair, which no tokenizer reads; a DataError then."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f'"{field}" holds half of a surrogate pair, which is not text'
        raise DataError(problem, field=field, code="surrogate", remedy="save it as UTF-8") from error
