"""Kills a training run at random moments, starts it again each time, and compares the end with an undisturbed run.

Command:  python benchmarks/kill_and_resume.py [--kills 10] [--config configs/quickstart.py] [--steps 60]
Out:      a table of the kills: when each came, whether a checkpoint was being written, where the run went on; then what
          differs in the end between the two runs: parameters, optimizer, place in the data, losses; status 1 if any.

Every third kill waits until a checkpoint is being written.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[1]


def start(config: Path, directory: Path, steps: int, flags: list[str]) -> subprocess.Popen:
    """train.py on its own: only the process that trains is killed."""
    shape = ["--train.steps", str(steps), "--train.checkpoint-every", "3", "--train.validate-every", "20"]
    command = [sys.executable, "train.py", str(config), "--workdir", str(directory), "--compare", *shape, *flags]
    with open(directory.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def losses(directory: Path) -> list[tuple[int, float]]:
    """(step, loss) in the order of metrics.jsonl; a line that a kill cut short is left out."""
    path, found = directory / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "loss" in line:
            found.append((line["step"], line["loss"]))
    return found


def complete(directory: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(p.name) for p in (directory / "checkpoints").glob("*") if p.name.isdigit())


def being_written(directory: Path) -> list[str]:
    """Checkpoints that are not complete yet."""
    return sorted(p.name.split(".")[0] for p in (directory / "checkpoints").glob("*tmp*"))


def kill_once(process: subprocess.Popen, directory: Path, at: int, in_save: bool) -> dict[str, object]:
    """Waits for step `at`, and for a checkpoint that is being written where that is asked for, and kills.

    Raises:
        RuntimeError: when the run ended first.
    """
    while not ((losses(directory) or [(0, 0.0)])[-1][0] >= at and (not in_save or being_written(directory))):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before step {at}; see {directory.with_suffix('.log')}")
        time.sleep(0.002)
    process.kill()
    process.wait()
    # What is written here is cut off for good: the process is gone.
    return {"step": losses(directory)[-1][0], "writing": being_written(directory), "complete": complete(directory)}


def newest(directory: Path) -> dict[str, object]:
    """Everything in the newest checkpoint, as NumPy arrays."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restore = ocp.args.StandardRestore(None, fallback_sharding=one)
    items = ocp.args.Composite(generator=restore, optimizer=restore, data=ocp.args.JsonRestore())
    step = (directory / "checkpoints" / str(complete(directory)[-1])).absolute()
    found = ocp.Checkpointer(ocp.CompositeCheckpointHandler()).restore(step, args=items)
    return jax.tree.map(np.asarray, {name: found[name] for name in ("generator", "optimizer", "data")})


def compare(one: Path, other: Path) -> int:
    """Prints how many arrays and losses differ; returns their number."""
    a, b, bad = newest(one), newest(other), 0
    for name in a:
        x, y = jax.tree.leaves(a[name]), jax.tree.leaves(b[name])
        differ = sum(not np.array_equal(p, q) for p, q in zip(x, y, strict=True))
        bad += differ
        print(f"{name:<10}{differ} of {len(x)} arrays differ")
    first, second = losses(one), losses(other)
    differ = sum(p != q for p, q in zip(first, second, strict=True))
    print(f"{'losses':<10}{differ} of {len(first)} lines of metrics.jsonl differ")
    return bad + differ


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.py")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments, flags = parser.parse_known_args()
    rng, root = random.Random(arguments.seed), Path(tempfile.mkdtemp(prefix="kill_and_resume"))
    killed, whole = root / "killed", root / "whole"
    moments = sorted(rng.randint(1, arguments.steps - 5) for _ in range(arguments.kills))
    print(f"{'kill':>4}  {'at step':>7}  {'being written':>13}  {'goes on from':>12}", flush=True)
    for number, at in enumerate(moments, start=1):
        process = start(arguments.config, killed, arguments.steps, flags)
        state = kill_once(process, killed, at, in_save=number % 3 == 0)
        writing, last = " ".join(state["writing"]) or "-", (state["complete"] or [0])[-1]
        print(f"{number:>4}  {state['step']:>7}  {writing:>13}  {last:>12}", flush=True)
    for directory in (killed, whole):
        if start(arguments.config, directory, arguments.steps, flags).wait():
            sys.exit(f"{directory}: the run failed; see {directory.with_suffix('.log')}")
    sys.exit(1 if compare(killed, whole) else 0)


if __name__ == "__main__":
    main()
