"""Printing and writing the tables, with what they cost to answer.

In: `Tables` and their jobs. Out: tables on standard output, tables.json, tables.md and figures. They are written before
costs are measured, which may fail, and again after.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.evaluation.sheet import Sheet, to_json, to_markdown, to_screen
from lora_gen_jax.files import complete_directory, write_json, write_text
from lora_gen_jax.lab.tables import figures, latency
from lora_gen_jax.lab.tables.cost_layout import all_tables, foot
from lora_gen_jax.lab.tables.jobs import Job
from lora_gen_jax.lab.tables.processes import say
from lora_gen_jax.lab.tables.results import gather
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
    to_screen(*write(out or tables.directory, results, costs), width=200)
    print("\n".join(foot(results, costs)))
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
    values = {"tables": [to_json(one) for one in sheets], "results": results, "costs": costs}
    write_json(directory / VALUES, values)
    write_text(directory / MARKDOWN, to_markdown(sheets, foot(results, costs)))
    return sheets
