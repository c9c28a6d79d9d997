"""Scores methods on tasks: ``python eval.py CONFIG.py [--tasks a,b] [--limit N] [--methods base,icl,lora_gen]``."""

from lora_gen_jax.cli import eval_main

if __name__ == "__main__":
    eval_main()
