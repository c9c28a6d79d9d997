"""The rows of the paper's agent table, and how measured ones are printed. In: metrics. Out: tables on the screen."""

import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_gen_jax.evaluation.published import AGENT, AGENT_COMPRESSION, AgentRow
from lora_gen_jax.evaluation.result_table import mean_of


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        title: how it is printed.
        published: the paper's row, Gemma on GPT4Tools.
    """

    title: str
    published: AgentRow

    @property
    def reads_prompt(self) -> bool:
        """The tools stand in the edge model's context."""
        return self.published.tools_in_prompt


METHODS = {
    "base_with_tools": Row("base, tools in context", AGENT[0]),
    "lora_with_tools": Row("LoRA, tools in context", AGENT[1]),
    "lora": Row("LoRA, no tools in context", AGENT[2]),
    "lora_gen_untrained": Row("LoRA-Gen, never saw tools", AGENT[3]),
    "lora_gen": Row("LoRA-Gen, trained on tools", AGENT[4]),
}
PUBLISHED = {
    "source": "the paper's Table 3, Gemma on GPT4Tools: not measured here",
    "average": {name: row.published.average for name, row in METHODS.items()},
    "compression": AGENT_COMPRESSION,
}
_TITLES = ("SR_t", "SR_act", "SR_args", "SR ± error", "IoU", "average", "edge\ntokens", "com-\npression", "latency\nms")


def print_tables(methods: dict[str, Any]) -> None:
    """A table for seen and one for unseen tools, and the published averages below."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for title in ("seen", "unseen"):
        scored = {name: groups[title] for name, groups in methods.items() if title in groups}
        if scored:
            console.print(measured_table(title, scored))
    console.print(published_table())


def measured_table(title: str, scored: dict[str, dict[str, Any]]) -> Table:
    """Metrics in percent; a row a method."""
    count = next(iter(scored.values()))["n"]
    table = Table(title=f"{title} tools, {count} requests, measured: % ± standard error")
    table.add_column("method")
    for column in _TITLES:
        table.add_column(column, justify="right")
    for name, m in scored.items():
        t, act, args, iou, average = (f"{100 * m[key]:.1f}" for key in ("sr_t", "sr_act", "sr_args", "iou", "average"))
        cells = [t, act, args, f"{100 * m['sr']:.1f} ± {100 * m['stderr']:.1f}", iou, average]
        cells += [f"{m['context_tokens']:.1f}", f"{m['compression']:.1f}×", mean_of([m["latency_ms"]], digits=2)]
        table.add_row(METHODS[name].title, *cells)
    return table


def published_table() -> Table:
    """What the paper reports, of other models and other data."""
    table = Table(title="published, not measured here: Gemma on GPT4Tools")
    table.add_column("method")
    table.add_column("average", justify="right")
    table.add_column("compression", justify="right")
    for row in METHODS.values():
        ratio = "1.0×" if row.reads_prompt else f"{PUBLISHED['compression']:.1f}×"
        table.add_row(row.title, f"{row.published.average:.1f}", ratio)
    return table
