"""A table as data: cells that are texts or measured figures. Out: a table on the screen, Markdown, or JSON."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from lora_gen_jax.evaluation.means import standard_error

MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        mean: over the seeds.
        error: standard error of that mean, or of the one value; None where it is not known, or none is meant.
        n: values.
        digits: that are shown behind the point.
        unit: shown behind the number, as "×".
    """

    mean: float
    error: float | None = None
    n: int = 1
    digits: int = 1
    unit: str = ""

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.{self.digits}f}"
        return f"{self.mean:.{self.digits}f}{error}{self.unit}"


Cell = str | Figure | None


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        number: of the paper's table.
        title: what is measured.
        columns: titles; the first is that of the rows.
        rows: as many cells each as there are columns; None is not there.
        notes: lines below.
        published: the paper's figures, in a table of its own.
    """

    number: int
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    published: "Sheet | None" = None

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title


def over_seeds(values: Iterable[float | None], scale: float = 1.0, digits: int = 1, unit: str = "") -> Figure | None:
    """Mean and standard error of the values that are there; None where there are none."""
    there = [scale * value for value in values if value is not None and not math.isnan(value)]
    if not there:
        return None
    error = standard_error(there) if len(there) > 1 else None
    return Figure(statistics.fmean(there), error, len(there), digits, unit)


def percent(values: Iterable[float | None], errors: Iterable[float | None] = ()) -> Figure | None:
    """Shares in percent; where there is one alone, with the standard error that it has by itself, over documents."""
    found, alone = over_seeds(values, 100), next(iter(errors), None)
    if found is None or found.n > 1 or alone is None:
        return found
    return dataclasses.replace(found, error=100 * alone)


def shown(cell: Cell) -> str:
    return MISSING if cell is None else str(cell)


def heading(sheet: Sheet) -> str:
    return f"Table {sheet.number}: {sheet.title}"


def to_rich(sheet: Sheet) -> Table:
    """The table on the screen; the first column to the left, figures to the right."""
    table = Table(title=heading(sheet), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if index else "left")
    for row in sheet.rows:
        table.add_row(*map(shown, row))
    if sheet.notes:
        table.caption, table.caption_justify = "\n".join(sheet.notes), "left"
    return table


def to_markdown(sheets: Sequence[Sheet], foot: Sequence[str] = ()) -> str:
    """All tables, the published figures below each."""
    return "\n\n".join([*map(_markdown, sheets), *foot]) + "\n"


def _markdown(sheet: Sheet) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join([" --- ", *[" ---: "] * (len(sheet.columns) - 1)]) + "|"
    lines = [f"**{heading(sheet)}**", "", line(sheet.columns), rule]
    lines += [line(map(shown, row)) for row in sheet.rows]
    text = "\n".join([*lines, *(f"\n{note}" for note in sheet.notes)])
    return text if sheet.published is None else f"{text}\n\n{_markdown(sheet.published)}"


def to_json(sheet: Sheet) -> dict[str, Any]:
    """The table as plain values: figures as {"mean", "stderr", "n"}."""

    def value(cell: Cell) -> Any:
        return {"mean": cell.mean, "stderr": cell.error, "n": cell.n} if isinstance(cell, Figure) else cell

    rows = [dict(zip(sheet.columns, map(value, row), strict=True)) for row in sheet.rows]
    published = None if sheet.published is None else to_json(sheet.published)
    return {"table": sheet.number, "title": sheet.title, "rows": rows, "notes": sheet.notes, "published": published}
