"""Whether a generator tells prompts apart: held-out answers under their task's own prompt and under the others'.

In: a checkpoint and the tasks' original files. Out: for every task the mean negative log-likelihood of a token of its
answers (nats), by the base model, with the specialization of its own prompt, and with those of the other tasks'
prompts; then how much gates vary between prompts and between layers. Loss alone does not show it: a generator that
makes one good adapter for all prompts has a low loss, and both columns the same.

Command:  python benchmarks/own_prompt.py --checkpoint DIR --data.dir DIR [--tasks a,b] [--rows 12] [--shots 3]
Time:     12 tasks with SmolLM2-135M, ten minutes on two CPU cores: every task is scored under every prompt.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from lora_gen_jax import merge
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.prompts import evaluation_shots, system_prompt
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.rows import Request
from lora_gen_jax.inference.scoring import score
from lora_gen_jax.models import Model
from lora_gen_jax.specializer import Specializer

REASONING = ("arc_easy", "openbookqa", "boolq", "social_iqa")
POCKET, POCKET_STEP = "pocket_seen", 3
BATCH_TOKENS = 1024


def chosen(names: str | None, directory: Path | None) -> list[Task]:
    """The named tasks, or four reasoning tasks and every third seen task of the pocket suite, up to twelve."""
    if names:
        return list(load_tasks(names.split(","), directory).values())
    pocket = list(load_tasks([POCKET]).values())[::POCKET_STEP]
    return [*load_tasks(REASONING, directory).values(), *pocket][:12]


def nats(edge: Model, params: Any, task: Task, rows: int) -> float:
    """Of a token of the answers to the first held-out rows: validation rows, or test rows where there are too few."""
    held_out = task.validation if len(task.validation) >= rows else task.test
    requests = []
    for example in held_out[:rows]:
        query, response = edge.encoder.query(example, False)
        requests.append(Request(query, [response]))
    scores = score(EdgeModel(edge.decoder, params), requests, batch_tokens=BATCH_TOKENS)
    tokens = sum(len(request.continuations[0]) for request in requests)
    return -sum(found.logprobs[0] for found in scores) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--data.dir", type=Path, default=None, dest="data_dir")
    parser.add_argument("--tasks", default=None)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--shots", type=int, default=3)
    flags = parser.parse_args()

    generator = Specializer.load(flags.checkpoint)
    edge, tasks = generator.pair.edge, chosen(flags.tasks, flags.data_dir)
    if len(tasks) < 2:
        parser.error("--tasks must name at least two tasks: each is scored under the others' prompts")
    prompts = [system_prompt(task.descriptions[0], evaluation_shots(task, flags.shots, 0)) for task in tasks]
    made = generator.specialize(prompts)
    found = np.zeros((len(tasks), len(tasks)))
    base = [nats(edge, edge.params, task, flags.rows) for task in tasks]
    for j, specialization in enumerate(made):
        params = merge(edge.params, generator.adapter(specialization))
        found[:, j] = [nats(edge, params, task, flags.rows) for task in tasks]
    print("| task | base | own prompt | other prompts, mean | the likeliest other |\n|---|---|---|---|---|")
    for i, task in enumerate(tasks):
        others = np.delete(found[i], i)
        print(f"| {task.name} | {base[i]:.2f} | {found[i, i]:.2f} | {others.mean():.2f} | {others.min():.2f} |")
    off = found[~np.eye(len(tasks), dtype=bool)]
    print(f"| mean | {np.mean(base):.2f} | {np.diag(found).mean():.2f} | {off.mean():.2f} | |")
    gates_TLE = np.stack([one.gates(generator.config.generator.num_experts).dense() for one in made])
    print(
        f"standard deviation of a gate: {gates_TLE.std(0).mean():.3f} between prompts,"
        f" {gates_TLE.std(1).mean():.3f} between layers"
    )


if __name__ == "__main__":
    main()
