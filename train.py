"""Trains a generator: ``python train.py configs/smollm2_135m.py [--workdir DIR] [--any.field VALUE …]``."""

from lora_gen_jax.cli import train_main

if __name__ == "__main__":
    train_main()
