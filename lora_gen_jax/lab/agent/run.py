"""The agent scenario: the five rows of the paper's Table 3, on seen and on unseen sets of tools.

In: a config, and rows of tools (a user's GPT4Tools files, or the embedded ones). What has no run yet is trained first,
each method in a directory of its own inside the work directory. Out: agent.json with the metrics and every output, and
two tables on the screen.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lora_gen_jax.buckets import bucket
from lora_gen_jax.commands import bar
from lora_gen_jax.config import Config
from lora_gen_jax.config_file import to_json
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import CheckpointError, ConfigError
from lora_gen_jax.evaluation import published
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.run import describe, machine
from lora_gen_jax.evaluation.sheet import to_screen
from lora_gen_jax.evaluation.systems import system_of
from lora_gen_jax.evaluation.task import System
from lora_gen_jax.files import check_output, complete_directory, write_json
from lora_gen_jax.lab.agent import scores as agent
from lora_gen_jax.lab.agent.outputs import (
    Writer,
    Written,
    as_read,
    blank_line,
    check_lengths,
    context_ids,
    latency,
    output_limit,
)
from lora_gen_jax.lab.agent.table import AGENT_ROWS, PUBLISHED, agent_sheets
from lora_gen_jax.lab.comparison import say
from lora_gen_jax.methods.registry import FULL_PROMPT, GENERATOR, METHODS
from lora_gen_jax.models import Pair, load_pair
from lora_gen_jax.sharding import evaluation_mesh
from lora_gen_jax.training.bucket import location
from lora_gen_jax.training.checkpoint import Loaded, check_method, check_models, complete, load_checkpoint, versions
from lora_gen_jax.training.loop import train
from lora_gen_jax.training.portable import SHIPPED
from lora_gen_jax.training.prepare import prepare_directory, training_tasks, with_steps


def score_agents(
    config: Config,
    tasks: Sequence[Task],
    methods: Sequence[str],
    untrained: Path | None,
    out: Path | None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Trains what has no run yet, scores the methods and writes agent.json; returns what it holds.

    Args:
        config: of the run: what is trained, and where.
        tasks: with test documents; the first description of each is its part for the cloud.
        methods: keys of `AGENT_ROWS`.
        untrained: a generator that never saw tools; the shipped one when None.
        out: directory for agent.json; the work directory when None.
        checkpoint: the generator of lora_gen; when None the one that is trained in the work directory.

    Raises:
        LoraGenError: for an unknown method, rows that cannot be scored or do not fit, a generator of other models, or
            an `out` that holds something; before anything is trained. And as training.
    """
    for method in methods:
        if method not in AGENT_ROWS:
            raise ConfigError(f"--methods has {method!r}; the methods are {', '.join(AGENT_ROWS)}", field="--methods")
    if out is not None:
        check_output(out)
    for task in tasks:
        for document in task.test:
            agent.compare(document.response, document.response)
    pair = load_pair(config, evaluation_mesh(config.mesh.fsdp))
    limit = output_limit(pair.edge, tasks)
    check_lengths(pair, tasks, limit, config.eval.prompt_limit, any(AGENT_ROWS[m].reads_prompt for m in methods))
    loaded = {}
    for name in methods:
        if AGENT_ROWS[name].method is GENERATOR and not AGENT_ROWS[name].trained:
            loaded[name] = untrained_generator(pair, untrained)
        elif AGENT_ROWS[name].method is GENERATOR and checkpoint is not None:
            loaded[name] = generator_for(pair, load_checkpoint(checkpoint))
    for name, variant in variants(config, pair, [m for m in methods if m not in loaded]).items():
        train_missing(name, variant)
        loaded[name] = load_checkpoint(variant.saved)
        check_models(loaded[name].fingerprints, pair.fingerprints, f"checkpoint {loaded[name].path}")
    report: dict[str, Any] = {"config": to_json(config), "versions": versions(), "machine": machine()}
    report |= {"checkpoints": {name: describe(one) for name, one in loaded.items()}, "published": PUBLISHED}
    report |= {"methods": {}, "outputs": {}}
    began = time.monotonic()
    journal = agent_journal(config)
    for name in methods:
        system, writer = make_system(config, pair, name, loaded.get(name)), Writer(pair.edge, limit, journal)
        made = score_system(writer, name, system, tasks, config.eval.latency)
        report["methods"][name], report["outputs"][name] = made
    say(f"scored {len(methods)} methods on {sum(len(t.test) for t in tasks)} rows in {time.monotonic() - began:.0f} s")
    add_compression(report["methods"], pair, tasks)
    write_report(report, config.directory, out, "agent.json")
    to_screen(*agent_sheets(report["methods"]), published.table_3())
    return report


def variants(config: Config, pair: Pair, methods: Sequence[str]) -> dict[str, Config]:
    """A config for every method that is trained.

    With the tools in the edge's context a row has room for them beside the same queries.
    """
    made = {}
    for name, row in AGENT_ROWS.items():
        if name not in methods or row.method is None or not row.trained:
            continue
        data = config.data
        if row.reads_prompt:
            texts = {text for task in training_tasks(config) for text in task.descriptions if text.strip()}
            longest = max(len(pair.edge.encoder.prompt(text)) for text in texts)
            if longest + data.query_length > pair.edge.config.max_positions:
                raise ConfigError(
                    f"the longest tools ({longest} tokens) and data.query_length = {data.query_length} are more than"
                    f" the {pair.edge.config.max_positions} positions of the edge model",
                    field="data.query_length",
                    remedy="lower data.query_length",
                )
            length = data.edge_length + bucket(longest)
            data = dataclasses.replace(data, edge_reads_prompt=True, edge_length=length)
        made[name] = dataclasses.replace(config.inside(name), method=row.method.key, compare=(), data=data)
    return made


def train_missing(name: str, config: Config) -> None:
    """Trains, or goes on training, unless the directory holds the last step of the same config."""
    known = with_steps(config)
    if complete(location(config.saved) / "checkpoints" / str(known.train.steps)):
        prepare_directory(known)
        return
    say(f"training {AGENT_ROWS[name].title}")
    train(config)


def untrained_generator(pair: Pair, named: Path | None) -> Loaded:
    """A generator that never saw tools."""
    loaded = load_checkpoint(named or SHIPPED["quickstart"])
    if named is None and loaded.fingerprints != pair.fingerprints:
        problem = "no generator that never saw tools is shipped for these models"
        remedy = "name one with --untrained-checkpoint, or leave lora_gen_untrained out of --methods"
        raise CheckpointError(problem, field="--untrained-checkpoint", remedy=remedy)
    return generator_for(pair, loaded)


def generator_for(pair: Pair, loaded: Loaded) -> Loaded:
    """The checkpoint, when it is a generator for these models."""
    check_method(loaded, GENERATOR.key)
    check_models(loaded.fingerprints, pair.fingerprints, f"checkpoint {loaded.path}")
    return loaded


def make_system(config: Config, pair: Pair, name: str, loaded: Loaded | None) -> System:
    """What a row scores, with the tools as the whole prompt."""
    alone = dataclasses.replace(config, eval=dataclasses.replace(config.eval, shots=0))
    method = FULL_PROMPT if loaded is None else METHODS[loaded.config.method]
    return dataclasses.replace(system_of(alone, pair, method, loaded), reads_prompt=AGENT_ROWS[name].reads_prompt)


def agent_journal(config: Config) -> RequestCache:
    """Outputs that were written in a work directory, by what was asked; of several processes the first keeps them."""
    directory = config.directory / "agent_requests" if jax.process_index() == 0 else None
    return RequestCache(directory, "agent", "give another --workdir")


def score_system(
    writer: Writer, name: str, system: System, tasks: Sequence[Task], timed: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and outputs of one method, each {"seen" | "unseen": …}; no latency unless `timed`."""
    metrics, outputs, end = {}, {}, blank_line(tasks)
    for title, seen in (("seen", True), ("unseen", False)):
        chosen = [task for task in tasks if task.seen == seen]
        if not chosen:
            continue
        with bar(f"{name} {title}", sum(len(task.test) for task in chosen)) as progress:
            rows = writer.write(system, chosen, progress)
        outputs[title] = [score_row(row, end) for row in rows]
        scores = [agent.AgentScore(**row["score"]) for row in outputs[title]]
        context = sum(row.context_tokens for row in rows) / len(rows)
        metrics[title] = agent.summarize(scores) | {"context_tokens": round(context, 1)}
        metrics[title]["latency_ms"] = round(latency(writer.edge, system, chosen), 2) if timed else None
        say(f"{AGENT_ROWS[name].title}, {title} tools: SR {100 * metrics[title]['sr']:.1f} %")
    return metrics, outputs


def score_row(row: Written, end: str | None) -> dict[str, Any]:
    """One row of agent.json."""
    gold = row.document.response
    output = as_read(row.text, gold, end)
    score = dataclasses.asdict(agent.compare(output, gold))
    named = {"id": row.document.id, "task": row.task.name, "query": row.document.query}
    return {**named, "gold": gold, "output": output, "score": score}


def add_compression(methods: dict[str, Any], pair: Pair, tasks: Sequence[Task]) -> None:
    """Edge tokens of a context with the tools over those that the method's edge reads, for every group."""
    for groups in methods.values():
        for title, metrics in groups.items():
            own = [task for task in tasks if task.seen == (title == "seen")]
            full = statistics.fmean(len(context_ids(pair.edge, t, d, reads_prompt=True)) for t in own for d in t.test)
            metrics["compression"] = round(full / metrics["context_tokens"], 2)


def write_report(report: dict[str, Any], directory: Path, out: Path | None, name: str) -> None:
    """The file `name`: in `out`, complete or not at all, else in the run's directory; the first process writes."""
    if jax.process_index():
        return
    if out is None:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / name, report)
    else:
        with complete_directory(out) as temporary:
            write_json(temporary / name, report)
    say(f"results: {(out or directory) / name}")
