"""The paper's tables with SmolLM2-135M-Instruct as cloud and as edge model, on the eight reasoning tasks.

Command:  python -m lora_gen_jax table configs/tables/smollm2.py --data.dir DIR --eval.limit 100
Size:     --train.steps and --eval.limit say how long it takes; --only NAME,NAME runs a part.
"""

import dataclasses
from pathlib import Path

from lora_gen_jax.config_file import read_config
from lora_gen_jax.tables.paper import KNOWLEDGE, variants
from lora_gen_jax.tables.spec import Change, Tables, reads_prompt

# As in the paper, the edge model of these methods reads the prompt with its shots before the queries: prompts are as
# long as the cloud's rows (data.cloud_length), queries as for the others (data.edge_length); the model has 8192
# positions.
READS_PROMPT = reads_prompt(prompt=320, queries=256, positions=8192)
# A short run wants a higher rate than the papers' epochs: one for all methods.
RUNS: dict[str, Change] = {
    "lora": {"method": "lora", "data": READS_PROMPT},
    "lora_alone": {"method": "lora"},
    "lora_moe": {
        "method": "lora_moe",
        "generator": {"rank": 4, "alpha": 32.0, "balance_coefficient": 0.0},
        "data": {**READS_PROMPT, "knowledge_tasks": KNOWLEDGE},
    },
    "mixlora": {"method": "mixlora", "generator": {"alpha": 32.0}, "data": READS_PROMPT},
    # One module for each of the five seen tasks.
    "lorahub": {"method": "lorahub", "hub": {"modules": 5}},
    "autocompressor": {
        "method": "autocompressor",
        "compressor": {"summary_tokens": 16},
        "data": {"edge_prompt_length": 320},
    },
    "lora_gen": {},
    **variants(),
}


def get_tables() -> Tables:
    base = read_config(Path(__file__).parents[1] / "smollm2_135m.py")
    # Five shots of the longest task are more than the default limit of a prompt.
    scoring = dataclasses.replace(base.eval, prompt_limit=4096)
    return Tables(dataclasses.replace(base, name="", eval=scoring), RUNS, jobs=1)
