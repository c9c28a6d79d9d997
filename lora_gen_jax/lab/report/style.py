"""How figures look. In: a method or a drawn figure. Out: its color and title; a PNG that is replaced at once.

Figures are drawn without pyplot: no window system, and no state that outlives them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_gen_jax.errors import OutputError
from lora_gen_jax.evaluation.controls import CONTROLS
from lora_gen_jax.methods.registry import METHODS

# What is no method: controls, and what only efficiency measures.
OTHERS = {
    **CONTROLS,
    "icl_kept_prefix": "in-context learning, the prompt's cache kept",
    "transformers_no_prompt": "transformers, no prompt",
    "transformers_full_prompt": "transformers, whole prompt",
    "transformers_kept_prefix": "transformers, the prompt's cache kept",
}
# Distinct for color-blind readers, and on white; methods take them in the order of their titles.
PALETTE = (
    *("#777777", "#4477aa", "#aa3377", "#b8a41f", "#228833", "#3aa7c9", "#ee8866", "#332288", "#cc3311"),
    *("#44aa99", "#882255", "#bbbbbb", "#99b8d8"),
)
_Item = TypeVar("_Item")
DPI = 110


def title_of(method: str, result: Mapping[str, Any] | None = None) -> str:
    """A method in words; with a result that says so, that the edge model did not read the prompt where it might."""
    known = METHODS.get(method)
    if known is None:
        return OTHERS.get(method, method)
    unread = known.may_read_prompt and result is not None and result.get("prompted") is False
    return (known.label or known.title) + ", no prompt" * unread


def color_of(method: str) -> str:
    """A method's color, the same in every figure."""
    order = (*METHODS, *OTHERS)
    place = order.index(method) if method in order else sum(method.encode())
    return PALETTE[place % len(PALETTE)]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches that keeps its parts apart."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Any, path: Path) -> Path:
    """Replaces the PNG."""
    temporary = path.with_name(f".{path.name}.tmp.png")
    try:
        figure.savefig(temporary, dpi=DPI)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        problem = f"{path} cannot be written: {error.strerror}"
        raise OutputError(problem, field="--out", code="unwritable", remedy="choose another --out") from error
    return path


def grid(count: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of a grid with room for `count` parts."""
    return math.ceil(count / columns), min(count, columns)


def evenly(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` of the items, spread over all of them."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def shortened(text: str, length: int) -> str:
    """The text, its middle left out where it is longer."""
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"
