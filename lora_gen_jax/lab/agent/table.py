"""The rows of the paper's agent table, and how measured ones are shown. In: metrics. Out: sheets."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_gen_jax.evaluation.published import AGENT, AGENT_COMPRESSION, AgentRow
from lora_gen_jax.evaluation.sheet import Sheet, average, number, percent, ratio
from lora_gen_jax.methods.method import Method
from lora_gen_jax.methods.registry import BASELINE, GENERATOR


class Row(NamedTuple):
    """A row of the table: how it is shown, the paper's row, Gemma on GPT4Tools, and what is trained for it.

    Attributes:
        method: whose checkpoint it needs; None for the edge model as it is.
        trained: here, on tools, in the directory of the row's name.
    """

    title: str
    published: AgentRow
    method: Method | None = None
    trained: bool = True

    @property
    def reads_prompt(self) -> bool:
        """The edge model's context holds the tools."""
        return self.published.tools_in_prompt


AGENT_ROWS = {
    "base_with_tools": Row("base, tools in context", AGENT[0], trained=False),
    "lora_with_tools": Row("LoRA, tools in context", AGENT[1], BASELINE),
    "lora": Row("LoRA, no tools in context", AGENT[2], BASELINE),
    "lora_gen_untrained": Row("LoRA-Gen, never saw tools", AGENT[3], GENERATOR, trained=False),
    "lora_gen": Row("LoRA-Gen, trained on tools", AGENT[4], GENERATOR),
}
PUBLISHED = {
    "source": "the paper's Table 3, Gemma on GPT4Tools: not measured here",
    "average": {name: row.published.average for name, row in AGENT_ROWS.items()},
    "compression": AGENT_COMPRESSION,
}
METRICS = {"sr_t": "SR_t", "sr_act": "SR_act", "sr_args": "SR_args", "sr": "SR", "iou": "IoU", "average": "average"}
_SIZES = ("edge\ntokens", "com-\npression", "latency\nms")


def agent_sheets(methods: Mapping[str, Any]) -> list[Sheet]:
    """A sheet for seen and one for unseen tools, from what agent.json holds under "methods"."""
    found = {name: groups for name, groups in methods.items() if isinstance(groups, dict)}
    sheets = []
    for title in dict.fromkeys(title for groups in found.values() for title in groups):
        rows = []
        for name, groups in found.items():
            if isinstance(m := groups.get(title), dict):
                shares = [percent(m.get(key), m.get("stderr") if key == "sr" else None) for key in METRICS]
                sizes = (
                    number(m.get("context_tokens")),
                    ratio(m.get("compression"), 1),
                    average([m.get("latency_ms")], 2),
                )
                label = AGENT_ROWS[name].title if name in AGENT_ROWS else name
                rows.append((label, str(m.get("n", "–")), *shares, *sizes))
        columns = ("method", "requests", *METRICS.values(), *_SIZES)
        sheets.append(Sheet(f"Tool calls, {title} tools: % ± standard error", columns, rows))
    return sheets


def call_sheet(methods: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> Sheet:
    """A row for every method and file of function calls, from what bfcl.json holds under "methods"."""
    rows = []
    for name, category, m in ((name, *item) for name, categories in methods.items() for item in categories.items()):
        shares = (percent(m["names"]), percent(m["arguments"]), percent(m["exact"], m["stderr"]))
        rows.append(
            (titles[name], category, str(m["n"]), *shares, number(m["context_tokens"]), ratio(m["compression"], 1))
        )
    columns = ("method", "file", "rows", "names", "arguments", "exact", *_SIZES[:2])
    return Sheet(
        "function calls, % ± standard error; where no function fits, the share without any call", columns, rows
    )
