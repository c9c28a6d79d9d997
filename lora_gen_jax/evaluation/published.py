"""Figures that the paper published, to be printed beside ours and never mixed with them.

In: nothing. Out: typed rows with their source. The published machine is an NVIDIA A100; its latencies say nothing about
those measured here.
"""

from dataclasses import dataclass

PAPER = "LoRA-Gen: Specializing Large Language Model via Online LoRA Generation (2025)"
MACHINE = "NVIDIA A100"


@dataclass(frozen=True)
class ReasoningRow:
    """Reasoning tasks, 5 shots.

    Attributes:
        model: the edge model.
        method: as the paper names it.
        ave: mean accuracy over the tasks in %.
        har: harmonic mean in %; None where it was not published.
        latency_ms: of one query on an A100.
        tasks: what was averaged.
    """

    model: str
    method: str
    ave: float
    har: float | None
    latency_ms: float
    tasks: str = "eight reasoning tasks"


@dataclass(frozen=True)
class AgentRow:
    """GPT4Tools with Gemma-2-2B.

    Attributes:
        method: as the paper names it.
        tools_in_prompt: the edge model reads the tool list.
        average: mean of the five metrics in %.
    """

    method: str
    tools_in_prompt: bool
    average: float


@dataclass(frozen=True)
class CostRow:
    """Cost with Qwen2-1.5B.

    Attributes:
        method: as the paper names it.
        inference_macs: multiply-adds of one query (the paper's column says FLOPs).
        inference_s: seconds of one query.
        training_step_s: seconds of one training step.
    """

    method: str
    inference_macs: float
    inference_s: float
    training_step_s: float


UNSEEN_THREE = "the three unseen tasks"
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
    ReasoningRow("OPT-2.7B", "AutoCompressors", 60.1, None, 11.4, UNSEEN_THREE),
    ReasoningRow("OPT-2.7B", "LoRA-Gen", 61.6, None, 7.54, UNSEEN_THREE),
)
"""Table 2 of the paper."""

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
