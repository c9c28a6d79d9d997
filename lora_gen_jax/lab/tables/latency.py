"""What an answer and a training step cost by method, measured with nothing else running, after all jobs have ended.

In: `Tables` and the rows of methods. Out: latency.json: {"workload": sizes, "answers": {row: figures}, "specializing",
"training"}. The work is that of a real task: its prompt with the most shots is about as long as the mean of all tasks.
All systems take turns. A file that was measured for the same settings is read instead.
"""

import dataclasses
import json
import statistics
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import to_json
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.evaluation.run import evaluated_tasks, machine
from lora_gen_jax.evaluation.task import task_prompt
from lora_gen_jax.files import write_json
from lora_gen_jax.lab.costs import measure as efficiency
from lora_gen_jax.lab.costs.command import make_setup
from lora_gen_jax.lab.costs.methods import UNTRAINED_ROWS, answering, workload_of_texts
from lora_gen_jax.lab.costs.training import training_costs
from lora_gen_jax.lab.tables.spec import GENERATOR, UNTRAINED, Tables, config_of, is_method_row
from lora_gen_jax.methods.answering import Ready, Workload
from lora_gen_jax.methods.registry import FULL_PROMPT
from lora_gen_jax.models import Pair, load_pair
from lora_gen_jax.training.checkpoint import versions

FILE, REPEATS, TRAINING_REPEATS = "latency.json", 21, 3


def measure_costs(tables: Tables, rows: Sequence[str]) -> dict[str, Any]:
    """Costs of the untrained rows and of `rows`, which are runs of the tables."""
    found = kept_costs(tables, rows)
    if "training" in found:
        return found
    (configs, own), path = timed_configs(tables, rows), tables.directory / FILE
    pair = load_pair(own)
    works = workloads(own, pair, tables.shots)
    if "answers" not in found:
        found = {"settings": asked(tables, configs, own), "machine": machine(), "versions": versions()}
        found |= answers(own, pair, works, configs)
        write_json(path, found, "--workdir")
    work = works[max(works)]
    # A step learns from the answers, so they count as read.
    sizes = (len(work.cloud_prompt), len(work.query) + work.new_tokens)
    found["training"] = training_costs(own, pair, *sizes, TRAINING_REPEATS)
    write_json(path, found, "--workdir")
    return found


def timed_rows(tables: Tables, finished: Container[str]) -> list[str]:
    """The finished runs whose answers are timed: those that stand for a method whose cost can be measured."""
    methods, known = {run: config_of(tables, run, tables.seeds[0]).method for run in tables.runs}, answering()
    return [run for run, key in methods.items() if run in finished and key in known and is_method_row(run, key)]


def timed_configs(tables: Tables, rows: Sequence[str]) -> tuple[dict[str, Config], Config]:
    """(configs of the rows, that of LoRA-Gen, which everything shared is made from)."""
    seed = tables.seeds[0]
    own = config_of(tables, GENERATOR if GENERATOR in tables.runs else UNTRAINED, seed)
    return {row: config_of(tables, row, seed) for row in rows}, own


def kept_costs(tables: Tables, rows: Sequence[str]) -> dict[str, Any]:
    """What was already measured for these rows, on this machine with these versions; it may lack "training"."""
    found = read(tables.directory / FILE, asked(tables, *timed_configs(tables, rows)))
    here = json.loads(json.dumps([machine(), versions()]))
    return found if [found.get("machine"), found.get("versions")] == here else {}


def asked(tables: Tables, configs: Mapping[str, Config], own: Config) -> dict[str, Any]:
    """Everything that the costs depend on."""
    parts = ("method", "generator", "lora_moe", "hub", "compressor", "cloud", "edge", "data")
    settings = {row: {part: to_json(config)[part] for part in parts} for row, config in configs.items()}
    e = own.eval
    scored = {"shots": list(tables.shots), "tasks": list(e.tasks), "seed": e.seed, "limit": e.limit}
    # As a file gives them back.
    return json.loads(json.dumps({"rows": settings, "eval": scored}))


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured for these settings; nothing where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if same(found.get("settings"), settings) else {}


def same(old: Any, new: Mapping[str, Any]) -> bool:
    """Whether both have the same rows, and all that an older version noted about them is the same."""
    if not isinstance(old, dict) or set(old["rows"]) != set(new["rows"]):
        return False
    return all(new["rows"][row] == new["rows"][row] | one for row, one in old["rows"].items()) and (
        new["eval"] == new["eval"] | old["eval"]
    )


def workloads(config: Config, pair: Pair, shots: Sequence[int]) -> dict[int, Workload]:
    """The same task and query by number of shots."""
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
    """{"workload", "answers", "specializing"}; rows of in-context learning with fewer shots are called icl_N."""
    most = max(works)
    setup, _ = make_setup(config, pair, works[most], None)
    known = answering()
    ready = {name: known[name](setup) for name in UNTRAINED_ROWS}
    for number in sorted(works):
        if number != most:
            ready[f"{FULL_PROMPT.key}_{number}"] = known[FULL_PROMPT.key](
                dataclasses.replace(setup, work=works[number])
            )
    for row, one in configs.items():
        efficiency.say(f"making {row} ready")
        # LoRA-Gen's generator stays, which the other methods do not ask for.
        ready[row] = known[one.method](dataclasses.replace(setup, config=one))
    times = efficiency.measure(ready, (1,), REPEATS)
    work = works[most]
    return {
        "workload": {
            "shots": most,
            "instruction_tokens": work.kept,
            "cloud_tokens": len(work.cloud_prompt),
            "input_tokens": len(work.query),
            "new_tokens": work.new_tokens,
        },
        "answers": {
            row: {"numbers_beside": beside(ready[row])} | found
            for row, found in efficiency.answers(ready, times).items()
        },
        "specializing": efficiency.specializing_cost(setup),
    }


def beside(ready: Ready) -> int:
    """Numbers that a method keeps beside the edge model's weights.

    Those are an adapter's parameters, and the keys and values of soft tokens, which are learned. A prompt's own keys
    and values only save time and are not counted.
    """
    count = sum(x.size for x in jax.tree.leaves(ready.model.adapter))
    if (prefix := ready.model.prefix) is not None and not prefix.ids:
        cache = prefix.cache
        used = np.count_nonzero(np.asarray(cache.position_BS) >= 0)
        count += int(used) * sum(x.size // x.shape[2] for x in (cache.k_LBSGH, cache.v_LBSGH))
    return count
