"""``python -m lora_gen_jax``: the same as the console script ``lora-gen``."""

from lora_gen_jax.cli import main

main()
