"""The rows that are abstracted, and what becomes of them.

In: files of Alpaca's rows, {"instruction", "input", "output"}. Out: `Source` rows, and from their outcomes the lines of
a task file, {"task", "system", "input", "output"}, and of the file of rows that were set aside.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_gen_jax.data.jsonl import Row, map_rows, read_rows
from lora_gen_jax.data.record_rows import SPLITS, check_text
from lora_gen_jax.data.tasks import normalize
from lora_gen_jax.errors import DataError

_SLUG = 40  # characters of the abstract instruction that a task's name begins with


@dataclass(frozen=True)
class Source:
    """One row as the user has it; `split` is None where the row does not say."""

    instruction: str
    input: str
    output: str
    split: str | None = None

    def fields(self) -> dict[str, str]:
        """As a row again."""
        split = {} if self.split is None else {"split": self.split}
        return {"instruction": self.instruction, "input": self.input, "output": self.output} | split


@dataclass(frozen=True)
class Outcome:
    """A row's abstract instruction and query; or, with `rejected`, why there is none and what was answered last."""

    abstract: str = ""
    query: str = ""
    rejected: str = ""
    reply: str = ""


def read_sources(paths: Sequence[Path], limit: int | None = None) -> list[Source]:
    """The rows of all files in their order, the first `limit` of them.

    Raises:
        DataError: with file and line, for a row of another form or a field that is no text. Fields may be empty.
    """
    sources: list[Source] = []
    for path in paths:
        rows = read_rows(path)
        sources += map_rows(path, rows[: None if limit is None else limit - len(sources)], _source)
    return sources


def _source(_: int, row: Row) -> Source:
    if "instruction" not in row:
        if "system" in row or "messages" in row:
            raise DataError(
                'rows with "system" or "messages" need no abstracting',
                field="instruction",
                code="needless",
                remedy="give the file to --data.files",
            )
        raise DataError(
            'the field "instruction" is missing: a row is {"instruction", "input", "output"}',
            field="instruction",
            code="missing",
        )
    if "output" not in row:
        raise DataError('the field "output" is missing', field="output", code="missing")
    texts: dict[str, str] = {}
    for name in ("instruction", "input", "output"):
        value = row.get(name)
        value = "" if value is None and name == "input" else value
        if not isinstance(value, str):
            raise DataError(f'"{name}" must be text, found {type(value).__name__}', field=name, code="type")
        check_text(value, name)
        texts[name] = value
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise DataError(f'"split" is {split!r}; it must be one of {", ".join(SPLITS)}', field="split", code="unknown")
    return Source(**texts, split=split)


def unusable(source: Source) -> str:
    """Why a row is set aside without asking for it; "" for the others."""
    for name in ("instruction", "output"):
        if not getattr(source, name).strip():
            return f'"{name}" is empty'
    return ""


def digest(sources: Sequence[Source]) -> str:
    """32 hex digits of the rows and their order."""
    texts = json.dumps([list(source.fields().items()) for source in sources])
    return hashlib.blake2b(texts.encode(), digest_size=16).hexdigest()


def task_name(abstract: str) -> str:
    """The same for texts that differ in case and punctuation alone: a few words, then a hash."""
    key = normalize(abstract)
    words = re.findall(r"[a-z0-9]+", unicodedata.normalize("NFKD", key))
    slug = "-".join(words)[:_SLUG].strip("-") or "task"
    return f"{slug}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"


def task_rows(sources: Sequence[Source], outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """The rows of the task file, in the order of the sources; a task's wording is its first row's."""
    wordings: dict[str, str] = {}
    rows: list[dict[str, str]] = []
    for source, outcome in zip(sources, outcomes, strict=True):
        if outcome.rejected:
            continue
        name = task_name(outcome.abstract)
        system = wordings.setdefault(name, outcome.abstract)
        row = {"task": name, "system": system, "input": outcome.query, "output": source.output}
        rows.append(row if source.split is None else row | {"split": source.split})
    return rows


def rejected_rows(sources: Sequence[Source], outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """The rows that were set aside, each as it was and with the reason."""
    return [
        source.fields() | {"reason": outcome.rejected} | ({"reply": outcome.reply} if outcome.reply else {})
        for source, outcome in zip(sources, outcomes, strict=True)
        if outcome.rejected
    ]
