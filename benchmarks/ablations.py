"""What each part of LoRA-Gen is worth, on the embedded suite: trains variants of the quickstart and scores them.

Command:  python benchmarks/ablations.py NAME [--steps N] [--out DIR]     NAME: shuffled, experts, top_k, pool, balance
Time:     as long as the quickstart's training for each variant; a variant that is trained already is only scored.
Result:   a table: exact answers on seen and unseen tasks, and how evenly the experts are used. See docs/pocket.md.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_gen_jax.config import Config
from lora_gen_jax.config_check import check
from lora_gen_jax.config_file import read_config
from lora_gen_jax.evaluation.run import evaluated_tasks, score_systems
from lora_gen_jax.evaluation.systems import load_checkpoints, make_systems
from lora_gen_jax.lab.comparison import gates_of, histogram, report_of
from lora_gen_jax.models import load_pair
from lora_gen_jax.training.loop import train

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"
# By ablation: the variants, as what they change in the quickstart's generator.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "shuffled": {"default": {}},
    "experts": {
        "default": {},
        "4 experts, all kept": {"num_experts": 4, "top_k": 4},
        "one expert: no router": {"num_experts": 1, "top_k": 1},
    },
    "top_k": {
        "default": {},
        "K = 1": {"top_k": 1},
        "K = 2": {"top_k": 2},
        "all kept": {"top_k": 16},
    },
    "pool": {"default": {}, "a pool for every layer": {"pool": "per_layer"}},
    "balance": {
        "default": {},
        "without CV loss": {"cv_coefficient": 0.0},
        "without BatchNorm": {"batch_norm": False},
        "without both": {"batch_norm": False, "cv_coefficient": 0.0},
    },
}


def variant(base: Config, changes: dict[str, Any], out: Path) -> Config:
    """The quickstart with changes, in a directory named after them."""
    name = "-".join(f"{field}_{value}" for field, value in changes.items()) or "default"
    generator = dataclasses.replace(base.generator, **changes)
    return check(dataclasses.replace(base, generator=generator, workdir=out / name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=VARIANTS)
    parser.add_argument("--steps", type=int, help="of training; left out, the quickstart's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    base = read_config(QUICKSTART)
    steps = args.steps or base.train.steps
    settings = dataclasses.replace(base.train, steps=steps, seed=args.seed)
    base = dataclasses.replace(base, compare=(), train=settings)
    methods = ("lora_gen", "shuffled") if args.name == "shuffled" else ("lora_gen",)
    table = Table(title=f"{args.name}: exact answers in %, {steps} steps, seed {args.seed}")
    for title in ("variant", "seen", "unseen", "expert usage"):
        table.add_column(title)
    out = args.out / f"{steps}-steps-seed-{args.seed}"
    for title, changes in VARIANTS[args.name].items():
        config = variant(base, changes, out)
        train(config)
        tasks, pair = evaluated_tasks(config), load_pair(config)
        checkpoints = load_checkpoints(config, methods, None)
        systems = make_systems(config, methods, pair, checkpoints, tasks)
        report = report_of(score_systems(config, pair, systems, tasks), tasks)
        usage = histogram(gates_of(config, pair, checkpoints, tasks) or {})
        for method in methods:
            cells = [f"{100 * report[g][method]['accuracy']:.1f}" for g in ("seen", "unseen")]
            table.add_row(title if method == "lora_gen" else "the prompt of another task", *cells, usage)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
