"""The paper's tables with OPT-2.7B as edge model and its own hyper-parameters, AutoCompressors among the methods.

Command:  python -m lora_gen_jax table configs/tables/opt_2_7b.py --data.dir DIR
Needs:    what configs/opt_2_7b.py needs, for every run in `lora_gen_jax/lab/tables/spec.py` and each of three seeds;
          --only NAME,NAME runs a part, and the same command goes on with the rest.
"""

from pathlib import Path

from lora_gen_jax.lab.tables.spec import Tables, paper_tables


def get_tables() -> Tables:
    return paper_tables(Path(__file__).parents[1] / "opt_2_7b.py", edge_positions=2048, compressor=True)
