"""train.py, which also notes each step's batch: a line with the step and a hash, in CONFIG.batches.

Several runs are made one after the other, their arguments with --then between them.
STEP_SECONDS in the environment makes every step take so long at least, so that a test can act between two of them.
TOLD_EARLY has process 1 receive SIGTERM after the checkpoint was restored and before the first step.
"""

import hashlib
import os
import signal
import sys
import time

import jax
import numpy as np

from lora_gen_jax.cli import train_main
from lora_gen_jax.training import loop

if __name__ == "__main__":
    place, running = loop.Run.place, ""

    def noted(run, batch):
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(batch)))
        with open(f"{running}.batches", "a") as file:
            file.write(f"{run.batches.next} {digest.hexdigest()}\n")
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        return place(run, batch)

    set_up = loop.set_up

    def set_up_and_told(*args):
        run = set_up(*args)
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)  # JAX tells the others in a moment
        return run

    loop.Run.place = noted
    if os.environ.get("TOLD_EARLY") == "1":
        loop.set_up = set_up_and_told
    left = sys.argv[1:]
    while left:
        end = left.index("--then") if "--then" in left else len(left)
        arguments, left = left[:end], left[end + 1 :]
        running = arguments[0]
        train_main(arguments)
