"""The runs of the paper's tables at its own scale, with each method's published hyper-parameters.

In: a config file of LoRA-Gen (the paper's Table 10). Out: `Tables` on the eight reasoning tasks.
"""

import dataclasses
from pathlib import Path

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import read_config
from lora_gen_jax.lab.tables.spec import Change, Tables, reads_prompt

# What LoRAMoE counts as questions about the world; the others are about something that stands in the query.
KNOWLEDGE = ("arc_challenge", "arc_easy", "openbookqa")


def paper_runs(base: Config, edge_positions: int, compressor: bool = False) -> dict[str, Change]:
    """Rows of the tables: methods and the variants of LoRA-Gen.

    Args:
        base: of LoRA-Gen; its lengths of prompt and queries are those of all.
        edge_positions: of the edge model.
        compressor: with AutoCompressors, which the paper compares on OPT alone.
    """
    reading = reads_prompt(base.data.cloud_length, base.data.edge_length, edge_positions)
    runs: dict[str, Change] = {
        "lora": {"method": "lora", "generator": {"rank": 16, "alpha": 16.0}, "data": reading},
        "lora_alone": {"method": "lora", "generator": {"rank": 16, "alpha": 16.0}},
        # The repository's script: no balance loss.
        "lora_moe": {
            "method": "lora_moe",
            "generator": {"num_experts": 8, "rank": 4, "alpha": 32.0, "balance_coefficient": 0.0},
            "data": {**reading, "knowledge_tasks": KNOWLEDGE},
            "train": {"learning_rate": 2e-4},
        },
        "mixlora": {
            "method": "mixlora",
            "generator": {"num_experts": 8, "top_k": 2, "rank": 16, "alpha": 32.0, "balance_coefficient": 0.01},
            "data": reading,
            "train": {"learning_rate": 2e-4},
        },
        # One for each of the five seen tasks; its authors draw 20 of about two hundred.
        "lorahub": {"method": "lorahub", "hub": {"modules": 5}},
        "lora_gen": {},
        **variants(),
    }
    if compressor:
        runs["autocompressor"] = {
            "method": "autocompressor",
            "generator": {"rank": 16, "alpha": 16.0},
            "compressor": {"summary_tokens": 50},
            "data": {"edge_prompt_length": 1536},
        }
    return runs


def variants() -> dict[str, Change]:
    """The ablations of LoRA-Gen; the values that are the default's have no run of their own.

    The paper's own ablation of the routing is gumbel_top_k. gumbel also changes how many experts are used.
    """
    return {
        "experts_4": {"generator": {"num_experts": 4}},
        "experts_12": {"generator": {"num_experts": 12}},
        "cv_0": {"generator": {"cv_coefficient": 0.0}},
        "cv_0.005": {"generator": {"cv_coefficient": 0.005}},
        "cv_0.1": {"generator": {"cv_coefficient": 0.1}},
        "gumbel_top_k": {"generator": {"routing": "gumbel_top_k"}},
        "gumbel": {"generator": {"routing": "gumbel"}},
        "direct": {"generator": {"generator": "direct"}},
    }


def paper_tables(path: Path, edge_positions: int, compressor: bool = False) -> Tables:
    """The tables of one pair of models.

    Args:
        path: of the config file that trains LoRA-Gen on it.
        edge_positions, compressor: as `paper_runs`.

    Raises:
        ConfigError: as `read_config`.
    """
    # The tables' own file gives the name, and so the work directory.
    base = dataclasses.replace(read_config(path), name="", compare=())
    return Tables(base, paper_runs(base, edge_positions, compressor))
