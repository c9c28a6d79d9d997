"""Berkeley's function calls: the base model with the functions in its context, and LoRA-Gen without them.

In: a config, files of rows, a generator. Nothing is trained. Out: bfcl.json with metrics by file and every output, and
a table on the screen.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import to_json
from lora_gen_jax.data.function_calls import NEXT_TURN, FunctionRow, load_function_calls
from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation.run import describe, machine
from lora_gen_jax.evaluation.sheet import to_screen
from lora_gen_jax.files import check_output
from lora_gen_jax.lab.agent.function_calls import CallScore, parse_calls, score_calls, summarize_calls
from lora_gen_jax.lab.agent.outputs import Writer, Written, check_lengths, context_ids, output_limit
from lora_gen_jax.lab.agent.run import agent_journal, make_system, write_report
from lora_gen_jax.lab.agent.table import AGENT_ROWS, call_sheet
from lora_gen_jax.lab.comparison import say
from lora_gen_jax.methods.registry import GENERATOR
from lora_gen_jax.models import Pair, load_pair
from lora_gen_jax.sharding import evaluation_mesh
from lora_gen_jax.training.bucket import location
from lora_gen_jax.training.checkpoint import (
    Loaded,
    check_method,
    check_models,
    find_checkpoint,
    load_checkpoint,
    versions,
)

TITLES = {"base_with_tools": "base, functions in context", GENERATOR.key: "LoRA-Gen, no functions in context"}


def score_function_calls(
    config: Config, paths: Sequence[Path], checkpoint: Path | None, limit: int | None, out: Path | None
) -> dict[str, Any]:
    """Scores both methods and writes bfcl.json; returns what it holds.

    Args:
        config: the models, eval.prompt_limit, and the work directory.
        paths: files of rows, or directories of them.
        checkpoint: the generator; when None that of the agent run in the work directory, or the config's own.
        limit: the first rows of every file.
        out: directory for bfcl.json; the work directory when None.

    Raises:
        LoraGenError: for rows that are malformed, where not a single one fits the models, for a generator of other
            models or of another method, or an `out` that holds something.
    """
    if out is not None:
        check_output(out)
    rows, loaded = load_function_calls(paths, limit), find_generator(config, checkpoint)
    pair = load_pair(config, evaluation_mesh(config.mesh.fsdp))
    check_models(loaded.fingerprints, pair.fingerprints, f"checkpoint {loaded.path}")
    fitting, skipped = divide(pair, rows, config.eval.prompt_limit)
    report: dict[str, Any] = {"config": to_json(config), "versions": versions(), "machine": machine()}
    report |= {"checkpoint": describe(loaded), "skipped": skipped, "methods": {}, "outputs": {}}
    tokens, journal = output_limit(pair.edge, [row.task for row in fitting]), agent_journal(config)
    for name in TITLES:
        system = make_system(config, pair, name, None if AGENT_ROWS[name].method is None else loaded)
        writer = Writer(pair.edge, tokens, journal)
        console = Console(file=sys.stderr)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            line = bar.add_task(name, total=len(fitting))
            tasks = [row.task for row in fitting]
            written = writer.write(system, tasks, lambda done, bar=bar, line=line: bar.advance(line, done))
        scored = [scored_row(row, one) for row, one in zip(fitting, written, strict=True)]
        report["outputs"][name], report["methods"][name] = scored, by_category(pair, fitting, written, scored)
        say(f"{TITLES[name]}: {len(scored)} rows")
    write_report(report, config.directory, out, "bfcl.json")
    to_screen(call_sheet(report["methods"], TITLES))
    if skipped:
        print("left out, too long for the models:", ", ".join(f"{name} {count}" for name, count in skipped.items()))
    return report


def find_generator(config: Config, named: Path | None) -> Loaded:
    """The generator that is named, else that of the agent run, else the config's own."""
    trained = location(config.inside(GENERATOR.key).saved)
    loaded = load_checkpoint(trained) if named is None and trained.is_dir() else find_checkpoint(config, named)
    check_method(loaded, GENERATOR.key)
    return loaded


def divide(pair: Pair, rows: Sequence[FunctionRow], prompt_limit: int) -> tuple[list[FunctionRow], dict[str, int]]:
    """(rows that fit both models, how many of each file do not)."""
    fitting = [row for row in rows if not too_long(pair, row, output_limit(pair.edge, [row.task]), prompt_limit)]
    if fitting:
        # The longest output of all rows is the limit of each.
        longest = output_limit(pair.edge, [row.task for row in fitting])
        fitting = [row for row in fitting if not too_long(pair, row, longest, prompt_limit)]
    if not fitting:
        reason = too_long(pair, rows[0], output_limit(pair.edge, [rows[0].task]), prompt_limit)
        raise DataError(f"none of {len(rows)} rows fits the models; the first: {reason}", field="rows")
    left = Counter(row.category for row in rows) - Counter(row.category for row in fitting)
    return fitting, dict(left)


def too_long(pair: Pair, row: FunctionRow, output: int, prompt_limit: int) -> str:
    """Why a row does not fit beside an output of so many tokens; "" where it does."""
    try:
        check_lengths(pair, [row.task], output, prompt_limit)
    except DataError as error:
        return str(error)
    return ""


def scored_row(row: FunctionRow, written: Written) -> dict[str, Any]:
    """One row of bfcl.json; all that was written counts, but what a model goes on to make the user say."""
    output = f"\n{written.text}".split(NEXT_TURN)[0].strip()
    score = score_calls(parse_calls(output), row.gold)
    named = {"id": written.document.id, "category": row.category, "query": written.document.query}
    return {**named, "gold": written.document.response, "output": output, "score": dataclasses.asdict(score)}


def by_category(
    pair: Pair, rows: Sequence[FunctionRow], written: Sequence[Written], scored: Sequence[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Metrics of every file, with the edge's tokens and how many more it would read with the functions."""
    metrics: dict[str, dict[str, float]] = {}
    for category in dict.fromkeys(row.category for row in rows):
        own = [i for i, row in enumerate(rows) if row.category == category]
        scores = [CallScore(**scored[i]["score"]) for i in own]
        read = sum(written[i].context_tokens for i in own) / len(own)
        documents = [(rows[i].task, rows[i].task.test[0]) for i in own]
        full = sum(len(context_ids(pair.edge, task, d, reads_prompt=True)) for task, d in documents) / len(own)
        sizes = {"context_tokens": round(read, 1), "compression": round(full / read, 2)}
        metrics[category] = summarize_calls(scores) | sizes
    return metrics
