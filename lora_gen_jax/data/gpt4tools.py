"""Agent rows for training and for scoring. In: a user's GPT4Tools files, or the embedded tools. Out: `Task`s, records.

Files are JSON arrays or JSONL of {"instruction", "input": "", "output"[, "id"]}.

The cloud reads an instruction up to the line that starts with "Previous conversation:" (persona, tools, formats), the
edge reads from there on. Rows with the same cloud part are one task. Files are training or test rows as a whole, as
the original release divides them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from lora_gen_jax.data.jsonl import Row, map_rows, read_rows
from lora_gen_jax.data.pocket.agent import agent_rows, agent_tasks, split_instruction, toolsets
from lora_gen_jax.data.tasks import Example, Task, normalize, stable_hash
from lora_gen_jax.errors import DataError

SOURCE = "gpt4tools"
_VALIDATION_PERCENT = 2


def load_gpt4tools(paths: Sequence[str | Path], seen: bool) -> list[Task]:
    """Test rows as tasks, one for every distinct cloud part, in the order of the files.

    Args:
        paths: of files in the release's schema.
        seen: whether training saw all of their tools.

    Returns:
        tasks without training rows; the cloud part is their one description, edge parts are queries.

    Raises:
        DataError: naming file, line and row for a row that is malformed or has no "Previous conversation:", and for
            an id that occurs twice.
    """
    grouped: dict[str, list[Example]] = {}
    for cloud, example in _read(paths):
        grouped.setdefault(cloud, []).append(example)
    return [
        Task(f"{SOURCE}/{stable_hash(cloud):016x}", (cloud,), (), tuple(rows), source=SOURCE, seen=seen)
        for cloud, rows in grouped.items()
    ]


def training_records(paths: Sequence[str | Path]) -> str:
    """Training rows as JSONL that ``data.files`` takes; one in fifty queries is held out for the validation loss.

    Raises DataError as `load_gpt4tools`.
    """
    lines = []
    for cloud, example in _read(paths):
        held_out = stable_hash("gpt4tools validation", normalize(example.query)) % 100 < _VALIDATION_PERCENT
        split = "validation" if held_out else "train"
        record = {"id": example.id, "system": cloud, "input": example.query, "output": example.response}
        lines.append(json.dumps({**record, "split": split}) + "\n")
    return "".join(lines)


def generated_records(rows_per_toolset: int) -> str:
    """Training rows of the embedded seen toolsets as JSONL that ``data.files`` takes, in three wordings a toolset.

    The suite's own tasks hold 24 training rows each, which a generator learns by heart; here they go on to
    `rows_per_toolset`. No request is also a validation or a test request of any toolset.

    Raises DataError where a toolset has fewer different requests.
    """
    descriptions = {task.name: task.descriptions for task in agent_tasks()}
    lines = []
    for toolset in toolsets(seen=True):
        wordings = descriptions[f"agent/{toolset.id}"]
        for split, count in (("train", rows_per_toolset), ("validation", None)):
            for i, row in enumerate(agent_rows(toolset, split, count)):
                query, system = split_instruction(row["instruction"])[1], wordings[i % len(wordings)]
                record = {"id": row["id"], "task": f"toolset/{toolset.id}", "split": split, "system": system}
                lines.append(json.dumps({**record, "input": query, "output": row["output"]}) + "\n")
    return "".join(lines)


def _read(paths: Sequence[str | Path]) -> list[tuple[str, Example]]:
    """(cloud part, example) of every row of every file."""
    found: list[tuple[str, Example]] = []
    ids: set[str] = set()
    for path in map(Path, paths):

        def add(index: int, row: Row, path: Path = path) -> tuple[str, Example]:
            cloud, example = _parse(index, row, f"{path.stem}/{row.get('id', index)}")
            if example.id in ids:
                raise DataError(f"row {index + 1}: the id {example.id!r} occurs twice", field="id", code="taken")
            ids.add(example.id)
            return cloud, example

        found += map_rows(path, read_rows(path), add)
    return found


def _parse(index: int, row: Row, name: str) -> tuple[str, Example]:
    for field in ("instruction", "output"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise DataError(f'row {index + 1}: "{field}" must be a text that is not empty', field=field, code="text")
    if row.get("input"):
        raise DataError(
            f'row {index + 1}: "input" must be empty: the whole prompt stands in "instruction"', field="input"
        )
    try:
        cloud, edge = split_instruction(row["instruction"])
    except DataError as error:
        raise error.within(f"row {index + 1}") from error
    if not cloud:
        problem = f'row {index + 1}: nothing stands before "Previous conversation:", so the cloud has no tools'
        raise DataError(problem, field="instruction", code="no tools")
    return cloud, Example(name, edge, row["output"])
