"""What an answer and a training step cost by method, measured alone on the machine after all jobs have ended.

In: `Tables` and the rows of methods. Out: latency.json: {"workload": sizes, "answers": {row: figures}, "specialising",
"training"}. The work is that of a real task: its prompt with the most shots is about as long as the mean of all tasks.
All systems take turns. A file that was measured for the same settings is read instead.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import to_json
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.evaluation import efficiency
from lora_gen_jax.evaluation.efficiency_command import make_setup
from lora_gen_jax.evaluation.efficiency_methods import METHODS, Ready, Setup, Workload, workload_of_texts
from lora_gen_jax.evaluation.efficiency_training import training_costs
from lora_gen_jax.evaluation.run import evaluated_tasks, machine
from lora_gen_jax.evaluation.task import task_prompt
from lora_gen_jax.files import write_json
from lora_gen_jax.models import Pair, load_pair
from lora_gen_jax.tables.spec import UNTRAINED, Tables, config_of
from lora_gen_jax.training.checkpoint import versions

FILE, REPEATS, TRAINING_REPEATS = "latency.json", 21, 3
# Rows that are no run: the base model reads the query alone, the prompt before it, or the prompt once.
UNTRAINED_ROWS = ("base", "icl", "icl_kept_prefix")


def measure_costs(tables: Tables, rows: Sequence[str]) -> dict[str, Any]:
    """Costs of the untrained rows and of `rows`, which are runs of the tables.

    Raises:
        ConfigError: when the work does not fit a model.
        OutputError: when the file cannot be written.
    """
    seed = tables.seeds[0]
    configs = {row: config_of(tables, row, seed) for row in rows}
    configs = {row: config for row, config in configs.items() if config.method in METHODS}
    own = config_of(tables, "lora_gen" if "lora_gen" in tables.runs else UNTRAINED, seed)
    path, settings = tables.directory / FILE, asked(tables, configs, own)
    found = read(path, settings)
    if "training" in found:
        return found
    pair = load_pair(own)
    works = workloads(own, pair, tables.shots)
    if "answers" not in found:
        found = {"settings": settings, "machine": machine(), "versions": versions()}
        found |= answers(own, pair, works, configs)
        write_json(path, found)
    work = works[max(works)]
    # A step learns from the answers, so they count as read.
    sizes = (len(work.cloud_prompt), len(work.query) + work.new_tokens)
    found["training"] = training_costs(own, pair, *sizes, TRAINING_REPEATS)
    write_json(path, found)
    return found


def asked(tables: Tables, configs: Mapping[str, Config], own: Config) -> dict[str, Any]:
    """Everything that the costs depend on."""
    parts = ("method", "generator", "compressor", "cloud", "edge", "data")
    settings = {row: {part: to_json(config)[part] for part in parts} for row, config in configs.items()}
    scored = {"shots": list(tables.shots), "tasks": list(own.eval.tasks), "seed": own.eval.seed}
    # As a file gives them back.
    return json.loads(json.dumps({"rows": settings, "eval": scored}))


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured for these settings; nothing where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.get("settings") == settings else {}


def workloads(config: Config, pair: Pair, shots: Sequence[int]) -> dict[int, Workload]:
    """The same task and query by number of shots.

    Raises:
        ConfigError: when they do not fit a model.
    """
    tasks, most = evaluated_tasks(config), max(shots)
    lengths = {task.name: len(pair.edge.encoder.text(prompt_of(task, config, most))) for task in tasks}
    mean = statistics.fmean(lengths.values())
    task = min(tasks, key=lambda task: (abs(lengths[task.name] - mean), task.name))
    documents = task.test[: config.eval.limit]
    new = statistics.fmean(len(pair.edge.encoder.text(document.response)) for document in documents)
    # Of WinoGrande's documents the query holds the answer.
    query = (documents[0].contexts or (documents[0].query,))[0]
    return {
        number: workload_of_texts(pair, prompt_of(task, config, number), query, max(2, round(new))) for number in shots
    }


def prompt_of(task: Task, config: Config, shots: int) -> str:
    """A task's system prompt with this many shots."""
    settings = dataclasses.replace(config.eval, shots=shots)
    prompt = task_prompt(task, settings)
    # Without description and shots there is nothing to read; the shortest text stands for it.
    return "." if prompt is None else prompt.text


def answers(config: Config, pair: Pair, works: Mapping[int, Workload], configs: Mapping[str, Config]) -> dict[str, Any]:
    """{"workload", "answers", "specialising"}; rows of in-context learning with fewer shots are called icl_N."""
    most = max(works)
    setup, _ = make_setup(config, pair, works[most], None)
    ready = {name: METHODS[name](setup) for name in UNTRAINED_ROWS}
    for number in sorted(works):
        if number != most:
            ready[f"icl_{number}"] = METHODS["icl"](dataclasses.replace(setup, work=works[number]))
    for row, one in configs.items():
        efficiency.say(f"making {row} ready")
        ready[row] = METHODS[one.method](with_config(setup, one))
    new = works[most].new_tokens
    systems = {row: efficiency.OurSystem(pair.edge.decoder, one, new) for row, one in ready.items()}
    times = efficiency.measure(systems, (1,), REPEATS)
    work = works[most]
    return {
        "workload": {
            "shots": most,
            "instruction_tokens": work.kept,
            "cloud_tokens": len(work.cloud_prompt),
            "input_tokens": len(work.query),
            "new_tokens": new,
        },
        "answers": {
            row: sizes_of(one)
            | efficiency.figures(times[row], new)
            | efficiency.answer_cost(pair.edge.decoder, one, new)
            for row, one in ready.items()
        },
        "specialising": efficiency.specialising_cost(setup),
    }


def with_config(setup: Setup, config: Config) -> Setup:
    """The set-up of a run; LoRA-Gen's generator stays, which the other methods do not ask for."""
    return dataclasses.replace(setup, config=config)


def sizes_of(ready: Ready) -> dict[str, int]:
    """What the edge model reads for a query, and what stays beside its weights."""
    adapter = sum(x.size for x in jax.tree.leaves(ready.adapter))
    return {"context_tokens": len(ready.ids), "kept_tokens": ready.kept, "adapter_parameters": adapter}
