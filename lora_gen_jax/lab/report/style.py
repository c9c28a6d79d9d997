"""How figures look. In: a method or a drawn figure. Out: its colour and title; a PNG that is replaced at once.

Figures are drawn without pyplot: no window system, and no state that outlives them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_gen_jax.errors import OutputError
from lora_gen_jax.methods.registry import METHODS, PROMPT_READING_METHODS

TITLES = {
    **{key: method.title for key, method in METHODS.items()},
    "base": "base, no prompt",
    "icl": "in-context learning",
    "lora_gen": "LoRA-Gen, no prompt",
    "paraphrase": "LoRA-Gen, another wording",
    "description": "LoRA-Gen, the description alone",
    "shots": "LoRA-Gen, the shots alone",
    "shuffled": "LoRA-Gen, another task's prompt",
    "gibberish": "LoRA-Gen, random tokens",
    "empty": "LoRA-Gen, an empty prompt",
    "icl_kept_prefix": "in-context learning, the prompt's cache kept",
    "transformers_no_prompt": "transformers, no prompt",
    "transformers_full_prompt": "transformers, whole prompt",
    "transformers_kept_prefix": "transformers, the prompt's cache kept",
}
# Distinct with colour-blind eyes, and on white.
_COLORS = {
    "base": "#777777",
    "icl": "#4477aa",
    "lora": "#b8a41f",
    "lora_gen": "#cc3311",
    "shuffled": "#aa3377",
    "lora_moe": "#228833",
    "mixlora": "#3aa7c9",
    "lorahub": "#ee8866",
    "autocompressor": "#332288",
    "icl_kept_prefix": "#44aa99",
    "transformers_no_prompt": "#bbbbbb",
    "transformers_full_prompt": "#99b8d8",
    "transformers_kept_prefix": "#a8d8cc",
}
PALETTE = ("#cc3311", "#4477aa", "#228833", "#b8a41f", "#aa3377", "#3aa7c9", "#ee8866", "#332288", "#777777")
_Item = TypeVar("_Item")
DPI = 110


def title_of(method: str, result: Mapping[str, Any] | None = None) -> str:
    """A method in words; with a result that says so, that the edge model did not read the prompt where it might."""
    alone = method in PROMPT_READING_METHODS and result is not None and result.get("prompted") is False
    return TITLES.get(method, method) + ", no prompt" * alone


def color_of(method: str) -> str:
    """A method's colour, the same in every figure."""
    return _COLORS.get(method) or PALETTE[sum(method.encode()) % len(PALETTE)]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches that keeps its parts apart."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Any, path: Path) -> Path:
    """Replaces the PNG.

    Raises:
        OutputError: when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp.png")
    try:
        figure.savefig(temporary, dpi=DPI)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error.strerror}",
            field="--out",
            code="unwritable",
            remedy="choose another --out",
        ) from error
    return path


def grid(count: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of a grid with room for `count` parts."""
    return math.ceil(count / columns), min(count, columns)


def evenly(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` of the items, spread over all of them."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def shortened(text: str, length: int) -> str:
    """The text, its middle left out where it is longer."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"
