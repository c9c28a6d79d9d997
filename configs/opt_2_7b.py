"""Llama-3-8B-Instruct as cloud model, OPT-2.7B as edge model; everything else is that of tinyllama_1b.py.

Command:  python train.py configs/opt_2_7b.py --data.dir DIR
Needs:    what tinyllama_1b.py needs.
"""

import dataclasses
from pathlib import Path

from lora_gen_jax.config import Config, ModelConfig
from lora_gen_jax.config_file import read_config


def get_config() -> Config:
    shared = read_config(Path(__file__).with_name("tinyllama_1b.py"))
    return dataclasses.replace(shared, name="", edge=ModelConfig("facebook/opt-2.7b", dtype="bfloat16", remat="full"))
