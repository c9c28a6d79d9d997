"""The command ``instructions``: rows of instruction data to tasks with abstract instructions, by a language model.

In: flags. Out: a JSONL file for `data.files`, one beside it with the rows that were set aside, and a line on standard
error. Heavy imports wait until the command runs, so that ``--help`` and mistakes answer at once.
"""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lora_gen_jax.errors import ConfigError, DataError, OutputError
from lora_gen_jax.files import write_text

if TYPE_CHECKING:
    from lora_gen_jax.instructions.asking import Asker
    from lora_gen_jax.instructions.partial import Partial
    from lora_gen_jax.instructions.rows import Outcome, Source

_KEY = "OPENAI_API_KEY"


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Turns rows of instruction data into tasks: each instruction becomes an abstract one, and a query.

    A language model behind any endpoint of OpenAI's kind is asked for every row; rows with the same abstract
    instruction are one task. A command that was stopped goes on when it is given again. Example:

    lora-gen instructions rows.json --endpoint http://localhost:8000/v1 --model NAME --out tasks.jsonl
    """

    rows: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON or JSONL files of {"instruction", "input", "output"}."""
    endpoint: str
    """Address of the endpoint, with /v1 or without."""
    model: str
    """The model's name there."""
    out: Path
    """The .jsonl file to write. NAME.rejected.jsonl beside it gets the rows that were set aside, NAME.partial.jsonl
    those that are finished while others are not."""
    api_key_env: str | None = None
    """Environment variable with the endpoint's key; left out, OPENAI_API_KEY if it is set. "" sends no key."""
    template: Path | None = None
    """A prompt of your own, with {rows} where the rows stand and {form} where the form of the reply is described."""
    rows_per_request: int = 1
    """Rows that are asked for at once: fewer requests, and more mistakes of small models."""
    concurrency: int = 4
    """Requests at the same time."""
    attempts: int = 3
    """Replies to a row until it is set aside, each but the first after the model was told what is wrong."""
    limit: int | None = None
    """Take the first N rows."""
    timeout: float = 120.0
    """Seconds that the endpoint may be silent."""
    retries: int = 6
    """Times that a request is sent again after errors that pass, with growing pauses."""
    dry_run: bool = False
    """Print the first request and send none."""


def instructions_command(flags: Instructions) -> None:
    """Checks what costs nothing first, asks for the rows that are not finished, and writes the files.

    Raises:
        LoraGenError: for flags, rows or a template that cannot work, an output that exists, finished rows of another
            command, and an endpoint that does not answer; finished rows are kept then.
    """
    from lora_gen_jax.instructions.asking import Asker
    from lora_gen_jax.instructions.endpoint import Endpoint
    from lora_gen_jax.instructions.prompt import read_template
    from lora_gen_jax.instructions.rows import read_sources
    from lora_gen_jax.instructions.settings import Settings, api_key, chat_url

    _check_numbers(flags)
    name = _KEY if flags.api_key_env is None else flags.api_key_env
    key = api_key(name, given=flags.api_key_env is not None)
    endpoint = Endpoint(Settings(chat_url(flags.endpoint), flags.model, key, name, flags.timeout, flags.retries))
    asker = Asker(endpoint, read_template(flags.template), flags.attempts)
    if flags.dry_run:
        _show(flags, asker, read_sources(flags.rows, flags.limit))
        return
    _check_out(flags.out)
    sources = read_sources(flags.rows, flags.limit)
    partial = _partial(flags, asker.template, sources)
    outcomes = _finish(flags, asker, partial, sources)
    _write(flags.out, sources, outcomes)
    partial.remove()


def _check_numbers(flags: Instructions) -> None:
    for name in ("rows_per_request", "concurrency", "attempts", "limit"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value}; it must be 1 or more", field=f"--{name.replace('_', '-')}"
            )
    if flags.retries < 0 or not 0 < flags.timeout < 1e6:
        raise ConfigError(
            f"--retries is {flags.retries}, --timeout {flags.timeout}; neither may be below 0, or no time",
            field="--retries" if flags.retries < 0 else "--timeout",
        )
    if not flags.model.strip():
        raise ConfigError("--model is empty", field="--model", remedy="name a model of the endpoint")


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.stem}.{what}.jsonl")


def _check_out(out: Path) -> None:
    """The outputs must not exist, but for what the same command has left behind."""
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out is {out}", field="--out", code="suffix", remedy="name a .jsonl file")
    taken = [out] if _beside(out, "partial").exists() else [out, _beside(out, "rejected")]
    for path in taken:
        if path.exists():
            raise OutputError(
                f"output {path} already exists",
                field="--out",
                code="exists",
                remedy="choose another --out, or remove it first",
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"--out {out} cannot be written: {error.strerror}",
            field="--out",
            code="unwritable",
            remedy="choose another place",
        ) from error


def _show(flags: Instructions, asker: "Asker", sources: "Sequence[Source]") -> None:
    from lora_gen_jax.instructions.asking import max_tokens
    from lora_gen_jax.instructions.prompt import first_messages
    from lora_gen_jax.instructions.rows import unusable

    first = [source for source in sources if not unusable(source)][: flags.rows_per_request]
    if not first:
        raise DataError("no row has an instruction and an output: there is nothing to ask", field="rows", code="empty")
    body = asker.endpoint.body(first_messages(asker.template, first), max_tokens(first))
    print(json.dumps({"url": asker.endpoint.settings.url, "body": body}, indent=2, ensure_ascii=False))


def _partial(flags: Instructions, template: str, sources: "Sequence[Source]") -> "Partial":
    from lora_gen_jax.instructions.partial import Partial
    from lora_gen_jax.instructions.rows import digest

    prompt = hashlib.blake2b(template.encode(), digest_size=16).hexdigest()
    identity = {"rows (files or --limit)": digest(sources), "--model": flags.model, "prompt (--template)": prompt}
    partial = Partial(_beside(flags.out, "partial"), identity, len(sources))
    if partial.done:
        print(f"{partial.path}: {len(partial.done)} of {len(sources)} rows are finished", file=sys.stderr)
    return partial


def _finish(flags: Instructions, asker: "Asker", partial: "Partial", sources: "Sequence[Source]") -> "list[Outcome]":
    """All outcomes, those of unfinished rows asked for."""
    from lora_gen_jax.instructions.asking import ask_all
    from lora_gen_jax.instructions.rows import Outcome, unusable
    from lora_gen_jax.terminal import bar

    reasons = {i: unusable(source) for i, source in enumerate(sources)}
    empty = {i: Outcome(rejected=reason) for i, reason in reasons.items() if reason}
    open_rows = [(i, source) for i, source in enumerate(sources) if i not in partial.done and i not in empty]
    size = flags.rows_per_request
    batches = [open_rows[start : start + size] for start in range(0, len(open_rows), size)]
    with bar("abstracting", len(sources)) as progress:

        def done(outcomes: "Mapping[int, Outcome]") -> None:
            partial.add(outcomes)
            progress(len(partial.done) + len(empty), len(sources))

        progress(len(partial.done) + len(empty), len(sources))
        ask_all(asker, batches, flags.concurrency, done)
    return [(empty | partial.done)[i] for i in range(len(sources))]


def _write(out: Path, sources: "Sequence[Source]", outcomes: "Sequence[Outcome]") -> None:
    """The rows that were set aside, then the tasks, each file at once; and what they hold, in a line."""
    from lora_gen_jax.instructions.rows import rejected_rows, task_rows

    rows, rejected = task_rows(sources, outcomes), rejected_rows(sources, outcomes)
    aside = ""
    if rejected:
        _write_rows(_beside(out, "rejected"), rejected)
        aside = f"; {len(rejected)} rows were set aside in {_beside(out, 'rejected')}, with the reasons"
    if not rows:
        raise DataError(
            f"none of the {len(sources)} rows came out{aside}",
            field="rows",
            code="rejected",
            remedy="try a more capable --model",
        )
    _write_rows(out, rows)
    sizes = Counter(row["task"] for row in rows)
    single = sum(size == 1 for size in sizes.values())
    print(f"{out}: {len(rows)} rows of {len(sizes)} tasks, {single} of them with a single row{aside}", file=sys.stderr)


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, "".join(lines))
