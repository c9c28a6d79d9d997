"""The user's own data. In: a JSONL or JSON-array file, or a directory of them. Out: `Task`s.

A row is one of
    {"system", "input", "output"}
    {"messages": [{"role": "system" | "user" | "assistant", "content"}, …]}      chat: the tokenizer's template applies
    {"instruction", "input", "output"}                                           Alpaca's rows; without output: left out
and may carry "task" (its name), "split" ("train" | "validation" | "test"), "id", and for multiple choice "options"
with "gold" (an index) or "answer" (an option's text, letter or index); the second and third form may have their
system text as "system", too. Other fields are ignored.

Rows of one file with the same system text are one task, so that shots and queries share a prompt. Rows with the same
"task" are one task too, whatever their file in a directory; their different system texts are wordings of its
description.
"""

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lora_gen_jax.data.jsonl import Row, map_rows, read_rows
from lora_gen_jax.data.record_rows import GENERIC_SYSTEM, Record, parse_record
from lora_gen_jax.data.tasks import Example, Task, hash_slice, partition, stable_hash, without_queries
from lora_gen_jax.errors import DataError

__all__ = ["GENERIC_SYSTEM", "load_records"]

log = logging.getLogger(__name__)
_LICENSES = "LICENSES.json"
"""A directory of rows may say in this file where they come from."""
_SPLIT_FROM = 20
"""Tasks with fewer different queries are training data altogether: one or two test rows would measure nothing."""
_HELD_OUT_PERCENT = 5
_LARGEST_PERCENT = 20
"""Rows that share their query, if they are a larger part of a task, are training data: all of them go to one split."""


@dataclass
class _Group:
    """The rows of one task while files are read."""

    source: str
    chat: bool
    splits: dict[str | None, list[Example]] = field(default_factory=dict)
    systems: dict[str, None] = field(default_factory=dict)


def load_records(path: str | Path) -> list[Task]:
    """The tasks in a file, or in all `*.jsonl` and `*.json` files of a directory (by name, not below it).

    A task is named by its "task" field, else by its file; where a file holds several system texts, each task's name
    adds a hash of its text. Rows without "split" are training rows, except in tasks of at least 20 different queries in
    which no row has one: there about 5 % are test and 5 % validation rows, by a hash of the query.
    Raises DataError with file and line for anything malformed; nothing is returned then.
    """
    root = Path(path)
    if root.is_dir():
        files = sorted(p for p in root.iterdir() if p.suffix in (".jsonl", ".json") and p.name != _LICENSES)
        if not files:
            raise DataError(f"{root} holds no .jsonl or .json file (data.files)", field="data.files", code="empty")
    elif root.exists():
        files = [root]
    else:
        raise DataError(f"{root} does not exist (data.files)", field="data.files", code="missing")
    groups: dict[tuple[str, ...], _Group] = {}
    for file in files:
        _collect(file, groups)
    if not groups:
        problem = f'{root}: every row has an empty "output", so there is nothing to learn (data.files)'
        raise DataError(problem, field="data.files", code="no rows")
    made = zip(_names(groups), map(_salt, groups), groups.values(), strict=True)
    tasks = [_make_task(name, salt, group) for name, salt, group in made]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        problem = f"{root}: two tasks are called {twice!r}"
        raise DataError(problem, field="data.files", code="taken", remedy='rename a file or its rows\' "task"')
    return tasks


def _collect(path: Path, groups: dict[tuple[str, ...], _Group]) -> None:
    """Adds the rows of one file to the groups they belong to."""
    ids: set[str] = set()
    unanswered = 0

    def add(index: int, row: Row) -> None:
        nonlocal unanswered
        row = {name: value for name, value in row.items() if value is not None}  # null: as if it were not there
        if "instruction" in row and "options" not in row and str(row.get("output", "?")).strip() == "":
            unanswered += 1  # Alpaca's files have some
            return
        example_id = f"{path.stem}-{index}"
        if "id" in row:
            example_id = f"{path.stem}/{row['id']}"
            if example_id in ids:
                raise DataError(f"the id {row['id']!r} occurs twice", field="id", code="taken")
        ids.add(example_id)
        record = parse_record(row, example_id)
        group = groups.setdefault(_group_key(path, record), _Group(path.stem, record.chat))
        if group.chat != record.chat:
            raise DataError(
                f'the task {record.task!r} mixes rows with and without "messages"', field="task", code="mixed"
            )
        group.systems.setdefault(record.system)
        group.splits.setdefault(record.split, []).append(record.example)

    map_rows(path, read_rows(path), add)
    if unanswered:
        log.warning('%s: %d rows with an "instruction" have an empty "output" and are left out', path, unanswered)


def _group_key(path: Path, record: Record) -> tuple[str, ...]:
    if record.task is not None:
        return ("task", record.task)
    # Chat rows and plain rows with the same system text are prompted differently.
    return ("file", path.stem, "chat" if record.chat else "plain", record.system)


def _names(groups: dict[tuple[str, ...], _Group]) -> list[str]:
    per_file: dict[str, int] = {}
    for kind, name, *_ in groups:
        if kind == "file":
            per_file[name] = per_file.get(name, 0) + 1
    names: list[str] = []
    for kind, name, *rest in groups:
        alone = kind == "task" or per_file[name] == 1
        names.append(name if alone else f"{name}/{_digest(*rest)}")
    return names


def _digest(*parts: str) -> str:
    # 48 bits: among 50,000 distinct instructions two meet with a chance of 4e-6.
    return hashlib.blake2b("\x1f".join(parts).encode("utf-8"), digest_size=6).hexdigest()


def _salt(key: tuple[str, ...]) -> str:
    """What tells tasks' splits apart: not the name, which changes when a file gets a second system text."""
    kind, name, *rest = key
    return name if kind == "task" else _digest(*rest)


def _make_task(name: str, salt: str, group: _Group) -> Task:
    rows = group.splits
    unmarked = rows.get(None, [])
    if len(rows) == 1 and len({example.query_key for example in unmarked}) >= _SPLIT_FROM:
        train, validation, test = _hash_split(salt, unmarked)
    else:
        train = [*rows.get("train", []), *unmarked]
        validation, test = rows.get("validation", []), rows.get("test", [])
    if test or validation:
        test_keys = {e.query_key for e in test}
        validation = without_queries(validation, test_keys)
        train = without_queries(train, test_keys | {e.query_key for e in validation})
    return Task(
        name,
        tuple(group.systems),
        tuple(train),
        tuple(test),
        tuple(validation),
        chat=group.chat,
        source=group.source,
    )


def _hash_split(salt: str, rows: list[Example]) -> tuple[list[Example], list[Example], list[Example]]:
    """(train, validation, test). A row's place depends only on its text, so rows added later move no other row.

    Queries of very many rows are the exception, and the one query that is taken where the hash holds none out.
    """
    counts = Counter(example.query_key for example in rows)
    common, rare = partition(rows, lambda _, example: counts[example.query_key] * 100 > _LARGEST_PERCENT * len(rows))
    parts: tuple[list[Example], ...] = ([], [], [])
    for example in rare:
        percent = stable_hash(salt, example.query_key) % 100
        parts[2 if percent < _HELD_OUT_PERCENT else 1 if percent < 2 * _HELD_OUT_PERCENT else 0].append(example)
    train, validation, test = parts
    if not test:
        test, train = hash_slice(train, 1, f"{salt}/test")
    if not validation:
        validation, train = hash_slice(train, 1, f"{salt}/validation")
    return [*common, *train], validation, test
