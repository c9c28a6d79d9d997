"""The eight reasoning tasks. In: a directory of their original files. Out: `Task`s, loaded only when named.

Scored splits are lm-evaluation-harness's: test for ARC and OpenBookQA, validation for the others. `assemble` makes a
task from any reader of splits, so that files and TFDS go through the same rules of hygiene.
"""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lora_gen_jax.data import rows
from lora_gen_jax.data.jsonl import Row, map_rows, read_rows, read_text
from lora_gen_jax.data.rows import Files, ReasoningTask, Source
from lora_gen_jax.data.tasks import Example, Task, hash_slice, without_queries
from lora_gen_jax.errors import DataError

DESCRIPTIONS: dict[str, list[str]] = json.loads(Path(__file__).with_name("descriptions.json").read_text("utf-8"))
"""Five wordings of each task, which keep the generator from keying on one fixed string; evaluation uses the first."""
DEFAULT_RESERVE = 1000
"""Rows taken from the scored split for shots and training where a task has no train split of its own."""
_VALIDATION_ROWS = 200
_log = logging.getLogger(__name__)

ReadSplit = Callable[[str, str], list[Example] | None]
"""(task name, "train" | "validation" | "test") → its examples, or None where the source has no such split."""


def _arc_files(name: str) -> Files:
    folders = (name, f"ARC-V1-Feb2018-2/{name}", f"ARC-V1-Feb2018/{name}")
    return Files(folders, (f"{name}-Train.jsonl",), (f"{name}-Dev.jsonl",), (f"{name}-Test.jsonl",))


def _released(
    name: str, example: Callable[[str, Row], Example], files: Files, tfds: Source, **more: Any
) -> ReasoningTask:
    return ReasoningTask(name, example, files, tuple(DESCRIPTIONS[name]), tfds=tfds, **more)


_ARC: dict[str, Any] = {"seen": True, "scored_on": "test"}
_TFDS = "tensorflow_datasets.text"
_SIZES = ("xl", "l", "m", "s", "xs")
REASONING_TASKS: dict[str, ReasoningTask] = {
    task.name: task
    for task in (
        # The same questions turn up in both: two stems of ARC-Easy's train split are in ARC-Challenge's test split.
        _released(
            "arc_challenge",
            rows.arc,
            _arc_files("ARC-Challenge"),
            Source("ai2_arc/ARC-Challenge", rows.arc_row),
            sibling="arc_easy",
            **_ARC,
        ),
        _released(
            "arc_easy",
            rows.arc,
            _arc_files("ARC-Easy"),
            Source("ai2_arc/ARC-Easy", rows.arc_row),
            sibling="arc_challenge",
            **_ARC,
        ),
        _released(
            "openbookqa",
            rows.openbookqa,
            Files(("OpenBookQA-V1-Sep2018", "OpenBookQA"), (), ("dev.jsonl",)),
            Source("openbookqa", rows.openbookqa_row),
            **_ARC,
        ),
        _released(
            "boolq",
            rows.boolq,
            Files(("BoolQ",), (), ("dev.jsonl", "val.jsonl")),
            Source("bool_q", rows.boolq_row),
            seen=True,
            # A train file without passages exists: a bare question is another task, so such rows are useless.
            usable=lambda row: bool(row.get("passage")),
        ),
        # Registered by social_iqa.py.
        _released(
            "social_iqa",
            rows.social_iqa,
            Files(("socialiqa-train-dev", "socialiqa"), (), ("dev.jsonl",)),
            Source("social_iqa", rows.social_iqa_row),
            seen=True,
        ),
        # The next two are not found by name in tensorflow-datasets before their module has been imported.
        _released(
            "hellaswag",
            rows.hellaswag,
            Files(("HellaSwag",), ("hellaswag_train.jsonl",), ("hellaswag_val.jsonl",)),
            Source("hellaswag", rows.hellaswag_row, module=f"{_TFDS}.hellaswag"),
        ),
        _released(
            "winogrande",
            rows.winogrande,
            Files(("winogrande_1.1",), tuple(f"train_{size}.jsonl" for size in _SIZES), ("dev.jsonl",)),
            Source("winogrande", rows.winogrande_row, "train_xl", f"{_TFDS}.winogrande"),
        ),
        _released(
            "piqa",
            rows.piqa,
            Files(("physicaliqa-train-dev", "physicaliqa"), (), ("valid.jsonl", "dev.jsonl")),
            Source("piqa", rows.piqa_row),
        ),
    )
}
"""By name. To add a task, write its file, which ends with a `ReasoningTask`, and its line here."""
SEEN_TASKS = tuple(name for name, task in REASONING_TASKS.items() if task.seen)


def load_reasoning(directory: str | Path, names: Iterable[str], *, reserve: int = DEFAULT_RESERVE) -> dict[str, Task]:
    """The named reasoning tasks from their files, one folder a task (ours or the original release's layout).

    `reserve` rows of the scored split serve as train split where a task has none (see `assemble`).
    Raises DataError: an unknown name, a missing directory, folder or split, a malformed row (with file and line).
    """
    root = Path(directory)
    if not root.is_dir():
        problem, remedy = f"the data directory {root} does not exist", "set --data.dir to the directory of the tasks"
        raise DataError(problem, field="data.dir", code="missing", remedy=remedy)

    def read(name: str, split: str) -> list[Example] | None:
        return _read_split(root, name, split)

    return {name: assemble(name, read, where=str(root), reserve=reserve) for name in names}


def folder_of(directory: str | Path, name: str) -> Path | None:
    """The folder of the reasoning task `name` in `directory`; None where there is none."""
    candidates = (Path(directory) / folder for folder in (name, *REASONING_TASKS[name].files.folders))
    return next((folder for folder in candidates if folder.is_dir()), None)


def assemble(name: str, read: ReadSplit, *, where: str, reserve: int = DEFAULT_RESERVE) -> Task:
    """One reasoning task from a reader of its splits; `where` says in errors what was read.

    - A task without a usable train split lends a slice of `reserve` rows (at most half) of a labelled split, fixed by
      a hash of the query; the slice is never scored.
    - Validation rows are the validation split where test is scored, else a fixed slice of train: at most 200 rows
      and 5 % of it (10 % of a lent slice).
    - Train rows whose normalized query is validated or scored on are dropped, validation rows that are scored too.
    Raises DataError: an unknown name or no scored split.
    """
    if name not in REASONING_TASKS:
        raise DataError(
            f"unknown reasoning task {name!r}; known: {', '.join(REASONING_TASKS)}", field="data.tasks", code="unknown"
        )
    task = REASONING_TASKS[name]
    split = task.scored_on
    scored = read(name, split)
    if not scored:
        problem = f"{where} has no {split} split of the task {name!r}, on which it is scored (--data.dir)"
        raise DataError(problem, field="data.dir", code="no split")
    train = read(name, "train") or []
    held = (read(name, "validation") or []) if split == "test" else []
    share = 20
    if not train:
        share = 10
        train, scored, held = _lend(name, scored, held, reserve)
    if not held:
        held, train = hash_slice(train, min(_VALIDATION_ROWS, len(train) // share), f"{name}/validation")
    scored_keys = {e.query_key for e in scored}
    held = without_queries(held, scored_keys)
    kept = without_queries(train, scored_keys | {e.query_key for e in held} | _sibling_keys(task.sibling, read))
    if len(kept) < len(train):
        _log.info("%s: dropped %d train rows whose query is validated or scored on", name, len(train) - len(kept))
    return Task(name, task.descriptions, tuple(kept), tuple(scored), tuple(held), source=name, seen=task.seen)


def _lend(
    name: str, scored: list[Example], held: list[Example], reserve: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """(train, scored, validation) of a task without train split: rows from validation, else from the scored split."""
    if held:
        _log.info("%s: no usable train split; the %d validation rows serve for shots and training", name, len(held))
        return held, scored, []
    lent, rest = hash_slice(scored, min(reserve, len(scored) // 2), f"{name}/reserve")
    _log.info(
        "%s: no usable train split; %d of %d scored rows are reserved for shots and training, results are on the "
        "other %d",
        *(name, len(lent), len(scored), len(rest)),
    )
    return lent, rest, []


def _sibling_keys(sibling: str | None, read: ReadSplit) -> set[str]:
    if sibling is None:
        return set()
    return {e.query_key for split in ("validation", "test") for e in read(sibling, split) or []}


def _find(root: Path, name: str, split: str) -> Path | None:
    """A split's file: directly in the task's folder, else anywhere below it (`Data/Main/train.jsonl`)."""
    folder = folder_of(root, name)
    if folder is None:
        return None
    for pattern in REASONING_TASKS[name].files.names(split):
        found = sorted(folder.glob(pattern)) or sorted(folder.rglob(pattern))
        if found:
            return found[0]
    return None


def _read_split(root: Path, name: str, split: str) -> list[Example] | None:
    path = _find(root, name, split)
    if path is None:
        return None
    found = join_labels(path, read_rows(path))
    usable = [row for row in found if REASONING_TASKS[name].usable(row[1])]
    if len(usable) < len(found):
        _log.info("%s: %d rows of %s cannot be used and are left out", name, len(found) - len(usable), path.name)
    return map_rows(path, usable, example_maker(name, split))


def example_maker(name: str, split: str) -> Callable[[int, Row], Example]:
    """Makes examples of one split's rows: under their own ids where they have one not used before, else numbered."""
    taken: set[str] = set()

    def make(index: int, row: Row) -> Example:
        example_id = str(row.get("id") or row.get("qID") or f"{split}-{index}")
        if example_id in taken:
            example_id = f"{example_id}#{split}-{index}"
        taken.add(example_id)
        return REASONING_TASKS[name].example(example_id, row)

    return make


def join_labels(path: Path, rows: list[tuple[int, Row]]) -> list[tuple[int, Row]]:
    """Adds "label" from `train-labels.lst` beside `train.jsonl` (PIQA, Social IQa) to rows that have no label.

    Raises DataError where there are not as many labels as rows.
    """
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    if "label" in rows[0][1] or not labels_path.is_file():
        return rows
    labels = read_text(labels_path).split()
    if len(labels) != len(rows):
        raise DataError(
            f"{labels_path}: {len(labels)} labels for the {len(rows)} rows of {path.name}", field=labels_path.name
        )
    return [(line, {**row, "label": label}) for (line, row), label in zip(rows, labels, strict=True)]
