"""How a case of side_by_side is printed. In: a `Comparison`. Out: text and a table on standard output."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_gen_jax.evaluation.sheet import Cell, Sheet, number, ratio, to_screen

if TYPE_CHECKING:
    from lora_gen_jax.lab.side_by_side.command import Comparison, Side

WIDTH = 110
# The last lines of a long prompt say least about it.
_SHOWN_LINES = 6
_ROWS = ("base model, reads prompt and input", "specialized model, reads the input alone")


def print_comparison(found: "Comparison") -> None:
    """The prompt, both answers, and what they cost."""
    case, sides = found.case, (found.base, found.specialized)
    print(f"\n{case.name}\n\n{textwrap.indent(shown_prompt(case.prompt), '  ')}\n\ninput:")
    print(textwrap.indent(case.input.strip(), "  "))
    for title, side in zip(_ROWS, sides, strict=True):
        print(f"\n{title}:\n{textwrap.indent(shown_answer(side), '  ')}")
    print()
    to_screen(comparison_sheet(found), width=WIDTH)
    saved = found.pays_after
    once = found.cloud_ms + found.merge_ms
    lines = (
        f"Once for this prompt: {once:.1f} ms; the cloud model reads {found.prompt_tokens} tokens"
        f" ({found.cloud_ms:.1f} ms), its experts are merged ({found.merge_ms:.1f} ms).",
        "The prefill saves nothing."
        if saved is None
        else f"The saved prefill makes up for it after {saved:.1f} queries.",
        "Times: best of five, after a run that compiles; an answer takes longer the longer it is.",
        case.remark,
    )
    print(textwrap.fill(" ".join(line for line in lines if line), WIDTH))


def comparison_sheet(found: "Comparison") -> Sheet:
    """What both models read, wrote and took, and the first over the second."""
    left, right = found.base, found.specialized
    rows: list[Sequence[Cell]] = []
    for title, side in zip(_ROWS, (left, right), strict=True):
        times = (number(side.first_token_ms, 2), number(side.answer_ms, 2))
        rows.append((title, number(side.context_tokens, 0), *times, number(side.new_tokens, 0)))
    pairs = ("context_tokens", "first_token_ms", "answer_ms")
    rows.append(("ratio", *(ratio(getattr(left, key), getattr(right, key), 2) for key in pairs), None))
    columns = ("", "edge context,\ntokens", "first token, ms", "answer, ms", "answer, tokens")
    return Sheet("What the edge model reads and writes", columns, rows)


def shown_answer(side: "Side") -> str:
    """The answer, marked where the limit cut it or where there is none."""
    text = side.answer.strip()
    if not text:
        return "(nothing: it ends at once)" if side.finish == "stop" else "(blank)"
    return text + (" …" if side.finish == "length" else "")


def shown_prompt(prompt: str) -> str:
    """The first lines of the prompt."""
    lines = prompt.strip().splitlines()
    left_out = len(lines) - _SHOWN_LINES
    return "\n".join(lines[:_SHOWN_LINES]) + (f"\n… {left_out} more lines" if left_out > 0 else "")
