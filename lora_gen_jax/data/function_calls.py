"""Rows of the Berkeley function-calling leaderboard as agent prompts, never trained on.

In: files ``bfcl_*.jsonl`` of {"id", "question": turns of messages, "function": descriptions, "ground_truth"}, where
`ground_truth` lists calls as {name: {argument: possible values}}, and [] means that no function fits. Out:
`FunctionRow`s: a task whose description (persona, functions, format of a call) the cloud reads and whose one query
(the user's question) the edge reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_gen_jax.data.jsonl import Row, map_rows, read_rows
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError

SOURCE = "bfcl"
NO_CALL = "no call"
"""What a model is told to write where no function fits."""
NEXT_TURN = "\nUser:"
"""How the user's next turn would begin, in the layout of `_messages`: no part of an answer."""
_PERSONA = "You help a user by calling functions."
_FORMAT = f"""Write the calls that the user's request needs, each on a line of its own and nothing else:
name(argument=value, other_argument=value)
Texts stand in double quotes. Leave out what is optional and was not asked for.
If no function fits the request, write: {NO_CALL}"""


@dataclass(frozen=True)
class FunctionRow:
    """One request.

    Attributes:
        task: with one test document; its response is one right answer, written as the prompt asks.
        category: the file's name without "bfcl_": simple_python, live_multiple, ….
        gold: the calls: (function's name, possible values by argument: "" among them, or none, where it may be left
            out).
    """

    task: Task
    category: str
    gold: tuple[tuple[str, Mapping[str, list[Any]]], ...]


def load_function_calls(paths: Sequence[str | Path], limit: int | None = None) -> list[FunctionRow]:
    """The rows of files, or of directories' bfcl_*.jsonl.

    Args:
        paths: files or directories.
        limit: the first rows of every file; all when None.

    Raises:
        DataError: for a directory without such files, and naming file and line for a malformed row.
    """
    rows: list[FunctionRow] = []
    for path in _files(paths):
        category = path.stem.removeprefix("bfcl_")
        rows += map_rows(path, read_rows(path)[:limit], lambda _, row, category=category: _parse(row, category))
    return rows


def _files(paths: Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("bfcl_*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise DataError(
                f"{path} holds no bfcl_*.jsonl", field="--bfcl", remedy="name the files, or their directory"
            )
        found += inside
    return found


def _parse(row: Row, category: str) -> FunctionRow:
    (turn,) = row["question"]
    gold = tuple(_gold_call(call) for call in row["ground_truth"])
    system, query = _messages(turn)
    example = Example(str(row["id"]), query, "\n".join(render(*call) for call in gold) or NO_CALL)
    description = "\n".join([_PERSONA, *system, "FUNCTIONS:", *map(function_text, row["function"]), _FORMAT])
    task = Task(f"{SOURCE}/{row['id']}", (description,), (), (example,), source=SOURCE, seen=False)
    return FunctionRow(task, category, gold)


def _messages(turn: list[dict[str, str]]) -> tuple[list[str], str]:
    """(system texts for the cloud, what the edge reads)."""
    system = [message["content"].strip() for message in turn if message["role"] == "system"]
    said = [f"{m['role'].capitalize()}: {m['content'].strip()}" for m in turn if m["role"] != "system"]
    if not said or turn[-1]["role"] != "user":
        raise DataError('"question" must end with a message of the user', field="question")
    return [text for text in system if text], "\n".join([*said, "Calls:"])


def _gold_call(call: dict[str, dict[str, list[Any]]]) -> tuple[str, Mapping[str, list[Any]]]:
    ((name, arguments),) = call.items()
    for argument, values in arguments.items():
        if not isinstance(values, list):
            problem = f'ground_truth of {name!r}: "{argument}" must be a list of possible values'
            raise DataError(problem, field=f"ground_truth.{name}.{argument}")
    return name, arguments


def function_text(function: Mapping[str, Any]) -> str:
    """A function's name, what it does, and a line for every argument; nested ones are indented."""
    lines = [f"> {function['name']}: {str(function.get('description', '')).strip()}"]
    return "\n".join([*lines, *_argument_lines(function.get("parameters") or {}, "  ")])


def _argument_lines(schema: Mapping[str, Any], indent: str) -> list[str]:
    lines, required = [], schema.get("required") or ()
    for name, argument in (schema.get("properties") or {}).items():
        kind = str(argument.get("type", "any"))
        items = argument.get("items") or {}
        if items.get("type"):
            kind += f" of {items['type']}"
        notes = f"{kind}{'' if name in required else ', optional'}"
        text = f"{indent}{name} ({notes}): {str(argument.get('description', '')).strip()}"
        if argument.get("enum"):
            text += f" One of {', '.join(map(str, argument['enum']))}."
        lines.append(text)
        for nested in (argument, items):
            lines += _argument_lines(nested, indent + "  ")
    return lines


def render(name: str, arguments: Mapping[str, list[Any]]) -> str:
    """One right way to write a call: the first possible values, without what may be left out."""
    given = {argument: values[0] for argument, values in arguments.items() if not _optional(values)}
    return f"{name}({', '.join(f'{argument}={_literal(value)}' for argument, value in given.items())})"


def _literal(value: Any) -> str:
    """A possible value as a Python literal; a dictionary's own values are lists of possible ones."""
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        chosen = {key: one[0] if isinstance(one, list) else one for key, one in value.items() if not _optional(one)}
        return "{" + ", ".join(f"{_literal(key)}: {_literal(one)}" for key, one in chosen.items()) + "}"
    return repr(value)


def _optional(values: Any) -> bool:
    return isinstance(values, list) and (not values or "" in values)
