"""The paper's tables with SmolLM2-135M-Instruct as cloud and as edge model, on the eight reasoning tasks.

Command:  lora-gen table configs/tables/smollm2.py --data.dir DIR --seeds 0 --only base,lora,lora_moe,mixlora,lora_gen
Size:     --train.steps, --eval.limit and --seeds say how long it takes; without --only all methods and ablations run.
"""

import dataclasses
from pathlib import Path

from lora_gen_jax.config_file import read_config
from lora_gen_jax.data.reasoning import SEEN_TASKS
from lora_gen_jax.lab.tables.spec import Change, Tables, reads_prompt, variants
from lora_gen_jax.methods.lora_moe import KNOWLEDGE

# As in the paper, the edge model of these methods reads the prompt with its shots before the queries, for which it has
# as much room as the others, in half as many rows of twice the length; the model has 8192 positions.
READS_PROMPT = {
    **reads_prompt(prompt=280, queries=320, positions=8192),
    "prompts_per_step": 8,
    "prompts_per_row": 2,
    "queries_per_prompt": 16,
    "response_slots": 128,
}
# A short run wants a higher rate than the papers' epochs: one for all methods.
RUNS: dict[str, Change] = {
    "lora": {"method": "lora", "generator": {"alpha": 16.0}, "data": READS_PROMPT},
    "lora_alone": {"method": "lora", "generator": {"alpha": 16.0}},
    "lora_moe": {
        "method": "lora_moe",
        "generator": {"rank": 4, "alpha": 32.0, "balance_coefficient": 0.0},
        "data": {**READS_PROMPT, "knowledge_tasks": KNOWLEDGE},
    },
    "mixlora": {"method": "mixlora", "generator": {"alpha": 32.0}, "data": READS_PROMPT},
    # One module for each of the five seen tasks.
    "lorahub": {
        "method": "lorahub",
        "generator": {"alpha": 16.0},
        "hub": {"modules": 5},
        "data": {"tasks": SEEN_TASKS, "source_weights": ()},
    },
    "autocompressor": {
        "method": "autocompressor",
        "generator": {"alpha": 16.0},
        "compressor": {"summary_tokens": 16},
        "data": {"edge_prompt_length": 320},
    },
    "lora_gen": {},
    **variants(),
}


def get_tables() -> Tables:
    base = read_config(Path(__file__).parents[1] / "smollm2_135m.py")
    return Tables(dataclasses.replace(base, name=""), RUNS, shots=(5,))
