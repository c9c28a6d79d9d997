"""One way to show a table. In: columns, and rows of texts and measured numbers. Out: screen, Markdown, HTML or JSON."""

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "–"
_PREFIXES = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))
_HTML = """<div class="scroll"><table><caption>{{ sheet.heading }}{% for note in sheet.notes %} {{ note }}.{% endfor %}
</caption><thead><tr>{% for column in sheet.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead><tbody>
{%- for row in sheet.texts %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>"""


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        mean: of the values.
        error: standard error of that mean; None where it is not known, or none is meant.
        n: values.
        digits: decimals that are shown.
        unit: shown after the number, such as "×".
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


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: what is measured.
        columns: headings; the first one is that of the rows.
        rows: as many cells as there are columns; None where a value is missing.
        notes: lines below.
        number: of the paper's table that this one reproduces.
        published: the paper's figures, as a table of their own.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    number: int | None = None
    published: "Sheet | None" = None

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title

    @property
    def heading(self) -> str:
        return self.title if self.number is None else f"Table {self.number}: {self.title}"

    @property
    def texts(self) -> list[list[str]]:
        """All cells as they are shown."""
        return [[MISSING if cell is None else str(cell) for cell in row] for row in self.rows]


def number(value: Any, digits: int = 1, unit: str = "") -> Figure | None:
    """A cell without an error; None for anything that is not a number."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return Figure(value, digits=digits, unit=unit) if known else None


def percent(share: float | None, error: float | None = None) -> Figure | None:
    """A share in percent, with its standard error where that is known."""
    return None if share is None else Figure(100 * share, None if error is None else 100 * error)


def ratio(above: float | None, below: float | None, digits: int = 1) -> Figure | None:
    """How many times the one is the other, as 36.1×; None where either is missing or zero."""
    return Figure(above / below, digits=digits, unit="×") if above and below else None


def average(values: Iterable[float | None], digits: int = 1) -> Figure | None:
    """The mean of what was measured; None where nothing was."""
    known = [value for value in values if value is not None]
    return Figure(sum(known) / len(known), n=len(known), digits=digits) if known else None


def si(value: float | None) -> str:
    """Three significant digits with a prefix: 37.5 G."""
    if value is None:
        return MISSING
    factor, prefix = next(((f, p) for f, p in _PREFIXES if value >= f), (1, ""))
    return f"{value / factor:.3g}{prefix}"


def to_screen(*sheets: Sheet, width: int = 120) -> None:
    """Prints tables, the published figures below each; `width` columns where standard output is not a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else width, highlight=False)
    for sheet in sheets:
        console.print(to_rich(sheet))
        if sheet.published is not None:
            console.print(to_rich(sheet.published))


def to_rich(sheet: Sheet) -> Any:
    """A `rich.table.Table`; numbers are on the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(sheet.heading), title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for index, column in enumerate(sheet.columns):
        measured = any(character.isdigit() for row in sheet.texts for character in row[index])
        table.add_column(Text(column), justify="right" if index and measured else "left")
    for row in sheet.texts:
        table.add_row(*map(Text, row))
    if sheet.notes:
        table.caption, table.caption_justify = Text("\n".join(sheet.notes)), "left"
    return table


def to_markdown(sheets: Iterable[Sheet], foot: Sequence[str] = ()) -> str:
    """All tables, the published figures below each."""
    return "\n\n".join([*map(_markdown, sheets), *foot]) + "\n"


def _markdown(sheet: Sheet) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join([" --- ", *[" ---: "] * (len(sheet.columns) - 1)]) + "|"
    lines = [f"**{sheet.heading}**", "", line(sheet.columns), rule, *map(line, sheet.texts)]
    text = "\n".join([*lines, *(f"\n{note}" for note in sheet.notes)])
    return text if sheet.published is None else f"{text}\n\n{_markdown(sheet.published)}"


def to_html(sheet: Sheet) -> Any:
    """A table that scrolls where it is too wide, as `markupsafe.Markup`."""
    from markupsafe import Markup

    return Markup(_template().render(sheet=sheet))


@functools.cache
def _template() -> Any:
    import jinja2

    return jinja2.Environment(autoescape=True).from_string(_HTML)


def to_json(sheet: Sheet) -> dict[str, Any]:
    """The table as plain values: figures as {"mean", "stderr", "n"}."""

    def value(cell: Cell) -> Any:
        return {"mean": cell.mean, "stderr": cell.error, "n": cell.n} if isinstance(cell, Figure) else cell

    rows: list[Mapping[str, Any]] = [dict(zip(sheet.columns, map(value, row), strict=True)) for row in sheet.rows]
    published = None if sheet.published is None else to_json(sheet.published)
    return {"table": sheet.number, "title": sheet.title, "rows": rows, "notes": sheet.notes, "published": published}
