"""The paper's tables with TinyLlama-1.1B as edge model and its own hyper-parameters.

Command:  python -m lora_gen_jax table configs/tables/tinyllama_1b.py --data.dir DIR
Needs:    what configs/tinyllama_1b.py needs, for every run in `lab/tables/spec.py`, and each of three seeds;
          --only NAME,NAME runs a part, and the same command goes on with the rest.
"""

from pathlib import Path

from lora_gen_jax.lab.tables.spec import Tables, paper_tables


def get_tables() -> Tables:
    return paper_tables(Path(__file__).parents[1] / "tinyllama_1b.py", edge_positions=2048)
