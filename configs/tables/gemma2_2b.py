"""The paper's tables with Gemma-2-2B as edge model and its own hyper-parameters.

Command:  python -m lora_gen_jax table configs/tables/gemma2_2b.py --data.dir DIR
Needs:    what configs/gemma2_2b.py needs, for every run in `lora_gen_jax/lab/tables/spec.py` and each of three seeds;
          --only NAME,NAME runs a part, and the same command goes on with the rest.
"""

from pathlib import Path

from lora_gen_jax.lab.tables.spec import Tables, paper_tables


def get_tables() -> Tables:
    return paper_tables(Path(__file__).parents[1] / "gemma2_2b.py", edge_positions=8192)
