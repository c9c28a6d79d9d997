"""train.py, which also notes each step's batch: a line with the step and a hash, in CONFIG.batches.

STEP_SECONDS in the environment makes every step take so long at least, so that a test can act between two of them.
"""

import hashlib
import os
import sys
import time

import jax
import numpy as np

from lora_gen_jax.cli import train_main
from lora_gen_jax.training import loop

if __name__ == "__main__":
    place = loop.Run.place

    def noted(run, batch):
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(batch)))
        with open(f"{sys.argv[1]}.batches", "a") as file:
            file.write(f"{run.batches.next} {digest.hexdigest()}\n")
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        return place(run, batch)

    loop.Run.place = noted
    train_main()
