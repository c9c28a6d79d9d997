"""Figures that the paper published, which are shown beside ours and never mixed with them.

In: nothing. Out: rows with their source, and tables of them. They were measured on an NVIDIA A100, so that the
latencies say nothing about those measured here.
"""

from collections.abc import Iterable
from typing import NamedTuple

from lora_gen_jax.evaluation.sheet import Sheet, number, si

PAPER = "LoRA-Gen: Specializing Large Language Model via Online LoRA Generation (2025)"
MACHINE = "NVIDIA A100"
NOT_OURS = f"published, {MACHINE}, not measured here"


class ReasoningRow(NamedTuple):
    """Reasoning tasks with 5 shots: accuracies in %, their harmonic mean where it was published, latency of a query."""

    model: str
    method: str
    ave: float
    har: float | None
    latency_ms: float


class AgentRow(NamedTuple):
    """GPT4Tools with Gemma-2-2B: whether the edge model reads the tools, and the mean of the five metrics in %."""

    method: str
    tools_in_prompt: bool
    average: float


class CostRow(NamedTuple):
    """Cost with Qwen2-1.5B: multiply-adds (the paper's column says FLOPs) and seconds of a query and a step."""

    method: str
    inference_macs: float
    inference_s: float
    training_step_s: float


REASONING = (
    ReasoningRow("TinyLlama-1.1B", "base", 51.7, 46.7, 44.5),
    ReasoningRow("TinyLlama-1.1B", "LoRA", 54.3, 48.5, 44.5),
    ReasoningRow("TinyLlama-1.1B", "LoRAMoE", 54.9, 49.3, 55.9),
    ReasoningRow("TinyLlama-1.1B", "MixLoRA", 54.5, 48.6, 100.1),
    ReasoningRow("TinyLlama-1.1B", "LoRA-Gen", 55.1, 49.8, 21.2),
    ReasoningRow("Qwen2-1.5B", "base", 57.3, 51.9, 56.3),
    ReasoningRow("Qwen2-1.5B", "LoRA-Gen", 59.8, 55.0, 26.7),
    ReasoningRow("Gemma-2-2B", "base", 61.8, 57.0, 87.3),
    ReasoningRow("Gemma-2-2B", "LoRA-Gen", 63.9, 60.2, 36.1),
)
"""Table 2 of the paper, over eight tasks."""
UNSEEN = (
    ReasoningRow("OPT-2.7B", "AutoCompressors", 60.1, None, 11.4),
    ReasoningRow("OPT-2.7B", "LoRA-Gen", 61.6, None, 7.54),
)
"""Table 4 of the paper, over the three unseen tasks."""
AGENT = (
    AgentRow("base", True, 79.3),
    AgentRow("LoRA", True, 88.4),
    AgentRow("LoRA", False, 75.1),
    AgentRow("LoRA-Gen, not trained on tools", False, 84.2),
    AgentRow("LoRA-Gen, trained on tools", False, 91.5),
)
"""Table 3 of the paper."""
AGENT_COMPRESSION = 10.1
"""How many times shorter the edge model's context is when the cloud reads the tool list."""
COST = (
    CostRow("LoRA", 4.708e11, 0.19, 0.85),
    CostRow("LoRA-Gen", 1.552e11, 0.11, 2.84),
)
"""Table 13 of the paper."""


def reasoning_sheet(rows: Iterable[ReasoningRow], table: int, tasks: str) -> Sheet:
    cells = [(r.model, r.method, number(r.ave), number(r.har), f"{r.latency_ms:g}") for r in rows]
    title = f"{NOT_OURS}: Table {table} of the paper, {tasks}, 5 shots"
    return Sheet(title, ("edge model", "method", "AVE, %", "HAR, %", "latency, ms"), cells)


def table_2() -> Sheet:
    return reasoning_sheet(REASONING, 2, "eight reasoning tasks")


def table_3() -> Sheet:
    read = {True: ("yes", number(1.0, unit="×")), False: ("no", number(AGENT_COMPRESSION, unit="×"))}
    rows = [(r.method, read[r.tools_in_prompt][0], number(r.average), read[r.tools_in_prompt][1]) for r in AGENT]
    columns = ("method", "tools in the edge's prompt", "average, %", "compression")
    return Sheet(f"{NOT_OURS}: Table 3 of the paper, Gemma-2-2B on GPT4Tools", columns, rows)


def table_4() -> Sheet:
    return reasoning_sheet(UNSEEN, 4, "the three unseen tasks")


def table_13() -> Sheet:
    rows = [(r.method, si(r.inference_macs), number(r.inference_s, 2), number(r.training_step_s, 2)) for r in COST]
    columns = ("method", "inference, multiply-adds", "inference, s", "training step, s")
    return Sheet(f"{NOT_OURS}: Table 13 of the paper, Qwen2-1.5B", columns, rows)
