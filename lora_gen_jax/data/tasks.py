"""What a task is. In: examples made from rows. Out: frozen `Example` and `Task`, and the splits' hygiene.

Every choice of rows (slices, splits, shots) goes by a BLAKE2 hash of the text, never by Python's `hash` or by the
order of a file: the same rows are chosen in every process, from JSONL and from TFDS.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

_PUNCTUATION = re.compile(r"[\s.,;:!?\"'`\u2018\u2019\u201c\u201d]+")


@dataclass(frozen=True)
class Example:
    """One query with its gold answer.

    Multiple choice: `options` holds every continuation and `options[gold] == response`. Free form: `options` is empty.
    Partial evaluation (WinoGrande): `contexts[i] + response` is scored for every i, and `query` is `contexts[gold]`, so
    that `query + response` reads as a shot; such a query contains the answer and is never shown when scoring.
    """

    id: str
    query: str
    """What the edge model reads, ending where the answer starts: `"Question: …\\nAnswer:"`."""
    response: str
    """The gold continuation. Multiple choice: with its leading space, `" Paris"`. Free form: the output verbatim."""
    options: tuple[str, ...] = ()
    gold: int = -1
    contexts: tuple[str, ...] = ()
    option_lengths: tuple[int, ...] = ()
    """Characters of every option as lm-evaluation-harness counts them for `acc_norm`: without the delimiting space."""
    turns: tuple[tuple[str, str], ...] = ()
    """(role, content) of a conversation with several turns, the user's last; `query` is its transcript then."""

    @cached_property
    def query_key(self) -> str:
        """The normalized query: what "the same query" means wherever leakage is ruled out."""
        return normalize(self.query)


@dataclass(frozen=True, eq=False)
class Task:
    """Examples that share a description. Two tasks are equal only when they are the same object.

    `descriptions[0]` is the one used at evaluation. Shots and training queries come from `train` only, `test` is
    scored, `validation` is held out of training for the validation loss. With `chat`, queries are user turns and the
    tokenizer's side applies the chat template. Mixture weights are keyed by `source`.
    """

    name: str
    descriptions: tuple[str, ...]
    train: Sequence[Example]
    test: Sequence[Example]
    validation: Sequence[Example] = ()
    chat: bool = False
    source: str = field(kw_only=True)
    seen: bool = True

    @cached_property
    def train_rows_by_key(self) -> dict[str, list[int]]:
        """The positions in `train` of every normalized query."""
        rows: dict[str, list[int]] = {}
        for i, example in enumerate(self.train):
            rows.setdefault(example.query_key, []).append(i)
        return rows

    @cached_property
    def held_out_keys(self) -> frozenset[str]:
        """The normalized queries that are scored or validated on: never shots at evaluation."""
        return frozenset(e.query_key for split in (self.validation, self.test) for e in split)


def normalize(text: str) -> str:
    """`text` without case, prose punctuation and runs of whitespace: equal results mean the same query.

    Operators stay (`2 + 3` is not `2 - 3`); a text of only punctuation is kept as it is.
    """
    return _PUNCTUATION.sub(" ", text.casefold()).strip() or text


def stable_hash(*parts: str) -> int:
    """A 64-bit hash of the texts, the same in every process and on every machine."""
    digest = hashlib.blake2b("\x1f".join(parts).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def contents(tasks: Iterable[Task]) -> dict[str, str]:
    """By source, 16 hex digits of all that training reads of its tasks: descriptions, training and validation rows."""
    found: dict[str, Any] = {}
    for task in tasks:
        rows = ((e.query, e.response, e.options, e.turns) for split in (task.train, task.validation) for e in split)
        digest = found.setdefault(task.source, hashlib.blake2b(digest_size=8))
        digest.update(repr((task.name, task.descriptions, task.chat, len(task.train))).encode())
        for row in rows:
            digest.update(repr(row).encode())
    return {source: digest.hexdigest() for source, digest in found.items()}


def hash_slice(examples: Sequence[Example], count: int, salt: str) -> tuple[list[Example], list[Example]]:
    """Splits off about `count` examples, chosen by a hash of their normalized query; both parts keep their order.

    Examples with the same normalized query go to the same part, so the slice may exceed `count` by such a group.
    """
    groups: dict[str, int] = {}
    keys = [e.query_key for e in examples]
    for key in keys:
        groups[key] = groups.get(key, 0) + 1
    chosen: set[str] = set()
    taken = 0
    for key in sorted(groups, key=lambda k: (stable_hash(salt, k), k)):
        if taken >= count:
            break
        chosen.add(key)
        taken += groups[key]
    return partition(examples, lambda i, _: keys[i] in chosen)


def partition(
    examples: Sequence[Example], belongs: Callable[[int, Example], bool]
) -> tuple[list[Example], list[Example]]:
    """The examples for which `belongs(index, example)` holds, and the others."""
    inside: list[Example] = []
    outside: list[Example] = []
    for i, example in enumerate(examples):
        (inside if belongs(i, example) else outside).append(example)
    return inside, outside


def without_queries(examples: Sequence[Example], keys: Collection[str]) -> list[Example]:
    """The examples whose normalized query is not among `keys`."""
    return [e for e in examples if e.query_key not in keys]
