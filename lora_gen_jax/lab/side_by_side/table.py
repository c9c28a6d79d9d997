"""How a case of side_by_side is printed. In: a `Comparison`. Out: a table on standard output."""

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lora_gen_jax.lab.side_by_side.command import Comparison, Side

WIDTH = 110
# The last lines of a long prompt say least about it.
_SHOWN_LINES = 6


def print_comparison(found: "Comparison") -> None:
    """The prompt, both answers, and what they cost."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(Text(f"\n{found.case.name}", style="bold"))
    console.print(Text(shown_prompt(found.case.prompt), style="dim"))
    console.print(comparison_table(found))
    once = found.cloud_ms + found.merge_ms
    console.print(
        f"Once for this prompt: {once:.1f} ms; the cloud model reads {found.prompt_tokens} tokens"
        f" ({found.cloud_ms:.1f} ms), its experts are merged ({found.merge_ms:.1f} ms)."
    )
    after = found.pays_after
    said = (
        "The prefill saves nothing."
        if after is None
        else f"The saved prefill makes up for it after {after:.1f} queries."
    )
    console.print(f"{said} Times: best of five, after a run that compiles; an answer takes longer the longer it is.")
    if found.case.remark:
        console.print(Text(found.case.remark))


def comparison_table(found: "Comparison") -> Table:
    """Base left, specialized right, and the first over the second."""
    left, right = found.base, found.specialized
    table = Table(show_lines=True, expand=True)
    table.add_column("")
    table.add_column("base model\nreads prompt and input", overflow="fold", ratio=1)
    table.add_column("specialized model\nreads the input alone", overflow="fold", ratio=1)
    table.add_column("ratio", justify="right")
    table.add_row("input", Text(found.case.input), Text(found.case.input), "")
    table.add_row("answer", Text(shown_answer(left)), Text(shown_answer(right)), "")
    table.add_row("edge context, tokens", *pair(left.context_tokens, right.context_tokens, 0))
    table.add_row("first token, ms", *pair(left.first_token_ms, right.first_token_ms, 2))
    table.add_row("answer, ms", *pair(left.answer_ms, right.answer_ms, 2))
    table.add_row("answer, tokens", str(left.new_tokens), str(right.new_tokens), "")
    return table


def pair(left: float, right: float, digits: int) -> tuple[str, str, str]:
    """Both values and their ratio."""
    return f"{left:.{digits}f}", f"{right:.{digits}f}", f"{left / right:.2f}×"


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
