"""Printing and writing the tables, with what they cost to answer.

In: `Tables` and their jobs. Out: tables on standard output, tables.json, tables.md and figures. They are written before
costs are measured, which may fail, and again after.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.files import complete_directory, write_json, write_text
from lora_gen_jax.lab.tables import figures, latency, sheet
from lora_gen_jax.lab.tables.cost_layout import all_tables, foot
from lora_gen_jax.lab.tables.jobs import Job
from lora_gen_jax.lab.tables.processes import say
from lora_gen_jax.lab.tables.results import gather
from lora_gen_jax.lab.tables.sheet import Sheet
from lora_gen_jax.lab.tables.spec import Tables
from lora_gen_jax.methods.registry import METHODS

MARKDOWN, VALUES = "tables.md", "tables.json"


def write_tables(tables: Tables, jobs: Sequence[Job], out: Path | None) -> bool:
    """Measures costs, prints the tables and writes them; whether the costs could be measured.

    Args:
        tables: these.
        jobs: all of them; those that are not finished leave dashes.
        out: directory to write, complete or not at all; the work directory where it is None.

    Raises:
        LoraGenError: for results of other settings, or a directory that cannot be written.
    """
    results = gather(jobs)
    if not results["facts"]:
        return True
    rows = latency.timed_rows(tables, results["facts"])
    costs = latency.kept_costs(tables, rows)
    if out is None:
        tables.directory.mkdir(parents=True, exist_ok=True)
        write(tables.directory, results, costs)
    else:
        with complete_directory(out) as temporary:
            write(temporary, results, costs)
    try:
        costs, failure = latency.measure_costs(tables, rows), None
    except (LoraGenError, jax.errors.JaxRuntimeError) as error:
        # What was measured until then counts.
        costs, failure = latency.kept_costs(tables, rows), error
    show(write(out or tables.directory, results, costs), foot(results, costs))
    figures.draw(out or tables.directory, results, costs)
    if failure is not None:
        say(f"costs cannot be measured: {failure}")
    say(f"tables: {(out or tables.directory) / MARKDOWN}")
    return failure is None


def write(directory: Path, results: dict[str, Any], costs: dict[str, Any]) -> list[Sheet]:
    """Writes both files, each replaced at once, and returns the tables.

    Raises:
        OutputError: when one cannot be written.
    """
    sheets = all_tables(results, costs, {name: method.traits for name, method in METHODS.items()})
    values = {"tables": [sheet.to_json(one) for one in sheets], "results": results, "costs": costs}
    write_json(directory / VALUES, values)
    write_text(directory / MARKDOWN, sheet.to_markdown(sheets, foot(results, costs)))
    return sheets


def show(sheets: Sequence[Sheet], lines: Sequence[str]) -> None:
    """The tables on standard output, the published figures below each."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    for one in sheets:
        console.print(sheet.to_rich(one))
        if one.published is not None:
            console.print(sheet.to_rich(one.published))
    console.print("\n".join(lines), highlight=False)
