"""``lora-gen report DIR [DIR …] [--out DIR]``.

In: directories of runs and evaluations. Out: report.html, complete in itself, and its PNGs.
"""

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from lora_gen_jax.errors import DataError, OutputError
from lora_gen_jax.files import listed, write_text

PAGE = "report.html"


@dataclasses.dataclass(frozen=True)
class Report:
    """Writes report.html and PNGs from what runs and evaluations have left.

    Reads results.json, report.json, gates.json, metrics.jsonl, efficiency.json and agent.json of the directories and of
    those directly inside them. Several directories are drawn together. Example:

    lora-gen report runs/quickstart
    """

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Work directories of runs, and outputs of eval.py and other commands."""
    out: Path | None = None
    """Directory for report.html and *.png, which are replaced; left out, the first directory."""
    tasks: str | None = None
    """Up to eight tasks whose accuracy is drawn against latency one by one, separated by commas; left out, all where
    there are no more than eight."""


def report_command(flags: Report) -> None:
    """Writes the report and says where it is."""
    path = write_report(flags.directories, flags.out, listed(flags.tasks))
    print(f"report: {path}", file=sys.stderr)


def write_report(directories: Sequence[Path], out: Path | None = None, tasks: Sequence[str] = ()) -> Path:
    """Writes report.html and its PNGs; returns the page's path.

    Args:
        directories: as of `Report`.
        out: where to; the first directory when None. Files of the same names are replaced, each at once.
        tasks: drawn one by one; all where they are few when empty.

    Raises:
        DataError: when there is nothing to report, a file is damaged, or a task is unknown.
        OutputError: when `out` cannot be written.
    """
    from lora_gen_jax.lab.report.found import find
    from lora_gen_jax.lab.report.sections import page

    found = find(directories)
    _check_tasks(tasks, [file.values for file in found.files["results.json"]])
    out = directories[0] if out is None else out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"output {out} cannot be written: {error.strerror}"
        raise OutputError(problem, field="--out", code="unwritable", remedy="choose another --out") from error
    write_text(out / PAGE, page(found, out, tasks, directories) + "\n")
    return out / PAGE


def _check_tasks(tasks: Sequence[str], results: Sequence[dict]) -> None:
    """Raises DataError for a task that no results.json has, or for too many."""
    from lora_gen_jax.lab.report.accuracy import MOST_TASKS

    if len(tasks) > MOST_TASKS:
        problem = f"--tasks names {len(tasks)} tasks; at most {MOST_TASKS} are drawn one by one"
        raise DataError(problem, field="--tasks", code="too many")
    methods = [method for values in results for method in (values.get("methods") or {}).values()]
    known = {name for method in methods if isinstance(method, dict) for name in method.get("tasks", ())}
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "no results.json of these directories has it"
            raise DataError(f"--tasks has the unknown task {name!r}", field="--tasks", code="unknown", remedy=hint)
