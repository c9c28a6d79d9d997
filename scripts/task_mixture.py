"""A mixture of several hundred short tasks in which only the prompt says what to do, as rows for data.files.

In: packages (pip install -e '.[mixture]') and, if given, directories of task files: JSON objects with
    {"name": "group/task", "descriptions": […], "train": [[input, output], …], "test": […], "source", "license"}.
Out: OUT/GROUP.jsonl, one file a group of tasks; OUT/LICENSES.json, where the rows of a group come from; and with
    --evaluate OUT/evaluate/GROUP.jsonl: tasks that are not trained on, as they are measured.

Command:  python scripts/task_mixture.py --out OUT [--tasks DIR …] [--evaluate DIR …] [--seed 0] [--rows 200]
          A task that nearly equals one of those to be evaluated is left out, and named.
Details:  docs/mixture.md
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from random import Random

from mixture.base import Base
from mixture.files import TaskFile, read_tasks
from mixture.forms import HELD_OUT, LAYOUTS, row, training_rows
from mixture.grammar import grammar_tasks
from mixture.lists import composed_tasks, list_tasks
from mixture.locales import locale_tasks
from mixture.numbers import number_tasks
from mixture.overlap import twin
from mixture.texts import text_tasks
from mixture.tools import tool_tasks
from mixture.words import chained_tasks, frequent_words, word_tasks

from lora_gen_jax.errors import DataError, LoraGenError

_OWN = {"source": "lora_gen_jax", "license": "Apache-2.0"}
_WORDS = {"source": "wordfreq", "license": "Apache-2.0, its word list CC BY-SA 4.0"}
PACKAGES = {
    "words": [_WORDS],
    "lists": [_WORDS],
    "compositions": [_WORDS],
    "numbers": [{"source": "num2words", "license": "LGPL-2.1-or-later"}],
    "locale": [{"source": "babel", "license": "BSD-3-Clause, its CLDR data Unicode-3.0"}],
    "grammar": [
        _WORDS,
        {"source": "lemminflect", "license": "MIT, its forms from the NIH SPECIALIST Lexicon"},
        {"source": "inflect", "license": "MIT"},
    ],
    "texts": [_OWN],
    "tools": [_OWN],
}
"""Packages that a group of generated tasks is made of."""
MEASURED = {"qa": LAYOUTS["qa"], "held_out": HELD_OUT}
FEWEST = 12
"""Tasks with fewer pairs are left out: they have too few for shots and queries."""


def generated(seed: int, count: int) -> Iterator[Base]:
    words = frequent_words()
    yield from word_tasks(words, seed, count)
    yield from list_tasks(words, seed, count)
    yield from composed_tasks(words, seed, count)
    yield from chained_tasks(words, seed, count)
    yield from number_tasks(seed, count)
    yield from locale_tasks(seed, count)
    yield from grammar_tasks(words, seed, count)
    yield from text_tasks(seed, count)
    yield from tool_tasks(seed, count)


def mixture(tasks: Iterable[Base], unseen: Sequence[TaskFile]) -> Iterator[Base]:
    """The tasks that are trained on, without pairs that are evaluated. Prints those that are refused."""
    names: set[str] = set()
    evaluated = {pair for task in unseen for pair in (*task.train, *task.test)}
    for task in tasks:
        if task.name in names:
            raise DataError(
                f"two tasks are called {task.name!r}",
                field="name",
                code="taken",
                remedy="rename the one in the task files",
            )
        names.add(task.name)
        if found := twin(task, unseen):
            print(f"left out: {task.name} answers as {found}, which is evaluated")
            continue
        pairs = tuple(pair for pair in task.pairs if pair not in evaluated)
        if len(pairs) >= FEWEST:
            yield replace(task, pairs=pairs)
        else:
            print(f"left out: {task.name} has {len(pairs)} pairs of input and output, at least {FEWEST} are needed")


def evaluation_rows(task: TaskFile) -> Iterator[dict[str, str]]:
    """The task's pairs as they are, in one layout that training has and in one that it has not."""
    for name, layout in MEASURED.items():
        for split, pairs in (("train", task.train), ("test", task.test)):
            for i, pair in enumerate(pairs):
                wording = task.wordings[i % len(task.wordings)]
                yield row(f"{task.name}@{name}", wording, layout, pair) | {"split": split}


def write_rows(folder: Path, rows: Iterable[dict[str, str]]) -> None:
    """One file a group, which is what stands before the slash in the name of a row's task."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[dict[str, str]]] = {}
    for found in rows:
        groups.setdefault(found["task"].split("/")[0], []).append(found)
    for group, members in groups.items():
        path = folder / f"{group}.jsonl"
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in members), encoding="utf-8")
        print(f"{path}: {len(members)} rows of {len({r['task'] for r in members})} tasks")


def licenses(files: Sequence[TaskFile], groups: Iterable[str]) -> dict[str, list[dict[str, str]]]:
    """By group, the packages with their versions or the data sets that its rows come from."""
    found = {g: [made | {"version": version(made["source"])} for made in PACKAGES.get(g, [])] for g in sorted(groups)}
    for task in files:
        named = {"source": task.source, "license": task.license}
        if task.group in found and named not in found[task.group]:
            found[task.group].append(named)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, nargs="+", default=[], help="directories of task files to train on")
    parser.add_argument("--evaluate", type=Path, nargs="+", default=[], help="directories of task files to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rows", type=int, default=200, help="pairs a task at most; in other answer formats half of it"
    )
    flags = parser.parse_args()
    try:
        if flags.rows < FEWEST:
            raise DataError(f"--rows is {flags.rows}; it must be at least {FEWEST}", field="--rows")
        seen, unseen = read_tasks(flags.tasks), read_tasks(flags.evaluate)
        from_files = (task.base(flags.seed, flags.rows) for task in seen)
        kept = list(mixture((*generated(flags.seed, flags.rows), *from_files), unseen))
        rows = (r for task in kept for r in training_rows(task, Random(f"{flags.seed}/{task.name}/rows"), flags.rows))
        write_rows(flags.out, rows)
        if unseen:
            write_rows(flags.out / "evaluate", (r for task in unseen for r in evaluation_rows(task)))
        named = licenses((*seen, *unseen), {task.group for task in (*kept, *unseen)})
        (flags.out / "LICENSES.json").write_text(
            json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        counts = Counter(task.group for task in kept)
        print(f"{len(kept)} base tasks: " + ", ".join(f"{n} {group}" for group, n in sorted(counts.items())))
    except LoraGenError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
