"""Scores methods on tasks: ``python eval.py configs/smollm2_135m.py [--tasks a,b] [--limit N] [--methods base,icl]``."""

from lora_gen_jax.cli import eval_main

if __name__ == "__main__":
    eval_main()
