"""LoraHub against its own modules: a composition found by search, and every module alone, on tasks held out of both.

Command:  python benchmarks/lorahub.py --checkpoint RUN [--tasks pocket_unseen] [--shots 5] [--seed 0]
          RUN: a run of method lorahub, such as runs/tables_pocket/lorahub/seed-0.
Time:     about two minutes for 24 tasks and 20 modules on two CPU cores.
Result:   a line a task: exact answers of the composition, of the module whose loss of the shots is the smallest (what
          could be chosen without test queries) and of the best module in hindsight; the losses of the shots beside.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.evaluation.run import evaluated_tasks
from lora_gen_jax.evaluation.task import System, evaluate_task, task_prompt
from lora_gen_jax.methods.lorahub import compose, found_weights, shots_loss
from lora_gen_jax.models import load_pair
from lora_gen_jax.training.checkpoint import check_method, load_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tasks", default="pocket_unseen")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of shots")
    args = parser.parse_args()
    loaded = load_checkpoint(args.checkpoint)
    check_method(loaded, "lorahub")
    scored = dataclasses.replace(
        loaded.config.eval, tasks=tuple(args.tasks.split(",")), shots=args.shots, seed=args.seed, latency=False
    )
    config = dataclasses.replace(loaded.config, eval=scored)
    pair, count = load_pair(config), config.hub.modules
    scale, find = config.generator.alpha / config.generator.rank, found_weights(config.hub, pair, loaded)
    table = Table(title=f"exact answers in % (loss of the shots, nats), {count} modules, {args.shots} shots")
    for title in ("task", "queries", "composed", "best module by the shots", "best module in hindsight", "base"):
        table.add_column(title, justify="left" if title == "task" else "right")
    rows = []
    for task in evaluated_tasks(config):
        prompt = task_prompt(task, scored)
        loss_of, found = shots_loss(pair.edge, loaded)(prompt), find(prompt)

        def accuracy(weights_N: np.ndarray, task=task) -> float:
            params = merge(pair.edge.params, compose(loaded.variables, np.float32(weights_N), scale))
            system = System(lambda task: pair.edge.plain.replace(params=params))
            return evaluate_task(pair.edge, task, system, scored)["acc"]

        alone = np.eye(count)
        losses, singles = np.array([loss_of(w) for w in alone]), np.array([accuracy(w) for w in alone])
        by_shots, best = int(np.argmin(losses)), int(np.argmax(singles))
        zero = np.zeros(count)
        row = [(accuracy(found.weights_N), loss_of(found.weights_N)), (singles[by_shots], losses[by_shots])]
        row += [(singles[best], losses[best]), (accuracy(zero), loss_of(zero))]
        rows.append((len(task.test), row))
        table.add_row(task.name, str(len(task.test)), *(f"{100 * acc:.0f} ({loss:.2f})" for acc, loss in row))
    queries = np.array([n for n, _ in rows], float)
    means = np.einsum("t,tcx->cx", queries / queries.sum(), np.array([row for _, row in rows]))
    table.add_row("all queries", f"{queries.sum():.0f}", *(f"{100 * acc:.1f} ({loss:.2f})" for acc, loss in means))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
