"""The paper's tables with TinyLlama-1.1B as edge model and its own hyper-parameters.

Command:  python -m lora_gen_jax table configs/tables/tinyllama_1b.py --data.dir DIR
Needs:    what configs/tinyllama_1b.py needs, for every run in `lab/tables/paper.py`, and each of three seeds;
          --only NAME,NAME runs a part, and the same command goes on with the rest.
"""

from pathlib import Path

from lora_gen_jax.lab.tables.paper import paper_tables
from lora_gen_jax.lab.tables.spec import Tables


def get_tables() -> Tables:
    return paper_tables(Path(__file__).parents[1] / "tinyllama_1b.py", edge_positions=2048)
