"""Berkeley's function calls: the base model with the functions in its context, and LoRA-Gen without them.

In: a config, files of rows, a generator. Nothing is trained. Out: bfcl.json with metrics by file (names, arguments,
both) and every output, and a table on the screen.

A call is ``name(argument=value, …)`` at the start of a line (after a bullet, a bracket or a backtick), or right after
another call. Values are read as Python literals and never run; a bare word is a text. Calls may stand in any order.

names is 1 where exactly gold's functions are called, each as often; arguments is the share of gold's calls for which a
call of that function has right arguments, no call counting twice; exact is 1 where both are 1. Where gold has no call
all three are 1 if nothing is called, else 0.

An argument is right if its value equals one of the possible ones: texts without case, spaces and the characters
,./-_*^ and with either quotation mark; numbers by value, so 5 is 5.0 (True is not a number); lists entry by entry, in
order; a dictionary key by key, each key with possible values of its own. Only what has "" among its possible values,
or none at all, may be left out, and nothing may be added.
"""

import ast
import dataclasses
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_gen_jax.commands import bar
from lora_gen_jax.config import Config
from lora_gen_jax.config_file import to_json
from lora_gen_jax.data.function_calls import NEXT_TURN, FunctionRow, load_function_calls
from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation.means import standard_error
from lora_gen_jax.evaluation.run import describe, machine
from lora_gen_jax.evaluation.sheet import to_screen
from lora_gen_jax.files import check_output
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

Gold = Sequence[tuple[str, Mapping[str, list[Any]]]]
_NAME = re.compile(r"[A-Za-z_][\w.\-/]*(?=\()")
_LINE = re.compile(r"^[ \t]*(?:(?:[-*•>]|\d+[.)])[ \t]+)?[`\[( \t]*", re.MULTILINE)
_BETWEEN = re.compile(r"[ \t,;`]*")
_IGNORED = re.compile(r"[ ,./\-_*^]")
# A call that no bracket closes is looked at so often and no longer.
_MOST_BRACKETS = 64


@dataclass(frozen=True)
class FunctionCall:
    """A call as it was written.

    Attributes:
        name: of the function.
        arguments: by name; None where one has no name, comes twice or is not a literal, so that none can be right.
    """

    name: str
    arguments: Mapping[str, Any] | None


@dataclass(frozen=True)
class CallScore:
    """The scores of one row, in [0, 1]."""

    names: float
    arguments: float
    exact: float


def parse_calls(text: str) -> list[FunctionCall]:
    """The calls of an output, in order; everything else in it is skipped."""
    calls: list[FunctionCall] = []
    at = 0
    while (line := _LINE.search(text, at)) is not None:
        at = line.end()
        while (found := _call_at(text, at)) is not None:
            call, end = found
            calls.append(call)
            between = _BETWEEN.match(text, end)
            at = end if between is None else between.end()
        following = text.find("\n", at)
        if following < 0:
            break
        at = following + 1
    return calls


def score_calls(predicted: Sequence[FunctionCall], gold: Gold) -> CallScore:
    """Scores the calls of one row, by the rules at the head of this file."""
    if not gold:
        right = float(not predicted)
        return CallScore(right, right, right)
    names = float(Counter(call.name for call in predicted) == Counter(name for name, _ in gold))
    fits = [[call.name == name and right_arguments(call, wanted) for call in predicted] for name, wanted in gold]
    arguments = _matched(fits) / len(gold)
    return CallScore(names, arguments, float(names == 1 and arguments == 1))


def right_arguments(call: FunctionCall, wanted: Mapping[str, list[Any]]) -> bool:
    """Whether every argument of a call is right and none is missing."""
    return call.arguments is not None and _same_keys(call.arguments, wanted)


def summarize_calls(scores: Sequence[CallScore]) -> dict[str, float]:
    """Means over rows: names, arguments and exact; the standard error of exact, and n."""
    if not scores:
        raise DataError("there are no function calls to summarize", field="scores", remedy="score at least one row")
    exact = [score.exact for score in scores]
    return {
        "names": statistics.fmean(score.names for score in scores),
        "arguments": statistics.fmean(score.arguments for score in scores),
        "exact": statistics.fmean(exact),
        "stderr": standard_error(exact),
        "n": len(scores),
    }


def _call_at(text: str, start: int) -> tuple[FunctionCall, int] | None:
    """The call that begins at `start`, and where it ends."""
    name = _NAME.match(text, start)
    if name is None:
        return None
    end = name.end()
    for _ in range(_MOST_BRACKETS):
        end = text.find(")", end) + 1
        if end == 0:
            return None
        # The name stays out: functions' names may hold what Python's may not.
        tree = _parsed(f"f{text[name.end() : end]}")
        if isinstance(tree, ast.Call):
            return FunctionCall(name[0], _arguments(tree)), end
    return None


def _parsed(source: str) -> ast.expr | None:
    try:
        with warnings.catch_warnings():
            # A text with a backslash in it is none of the user's concern.
            warnings.simplefilter("ignore")
            return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _arguments(call: ast.Call) -> dict[str, Any] | None:
    values: dict[str, Any] = {}
    if call.args:
        return None
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in values:
            return None
        try:
            values[keyword.arg] = _value(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return None
    return values


def _value(node: ast.expr) -> Any:
    """A literal's value; a bare word is a text. Raises ValueError for anything that would have to be run."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("a dictionary is unpacked into another one")
        keys = [_value(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_value, node.values), strict=True))
    return ast.literal_eval(node)


def _same(made: Any, wanted: Any) -> bool:
    if isinstance(made, str) and isinstance(wanted, str):
        return _standard(made) == _standard(wanted)
    if isinstance(made, bool) or isinstance(wanted, bool):
        return made is wanted
    if isinstance(made, (int, float)) and isinstance(wanted, (int, float)):
        return made == wanted
    if isinstance(made, list) and isinstance(wanted, list):
        return len(made) == len(wanted) and all(map(_same, made, wanted))
    if isinstance(made, dict) and isinstance(wanted, dict):
        return _same_keys(made, wanted)
    return made is None and wanted is None


def _same_keys(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether what is given is among the possible values of its key, and only optional keys are missing."""
    if not made.keys() <= wanted.keys():
        return False
    # Some files give a key of a dictionary its one value instead of a list of possible ones.
    possible = {key: values if isinstance(values, list) else [values] for key, values in wanted.items()}
    return all(
        any(_same(made[key], value) for value in values) if key in made else "" in values or not values
        for key, values in possible.items()
    )


def _standard(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _matched(fits: list[list[bool]]) -> int:
    """How many gold calls find a call of their own (rows gold, columns predicted)."""
    owner: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in tried:
                tried.add(column)
                if column not in owner or place(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    return sum(place(row, set()) for row in range(len(fits)))


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
        with bar(name, len(fitting)) as progress:
            written = writer.write(system, [row.task for row in fitting], progress)
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
