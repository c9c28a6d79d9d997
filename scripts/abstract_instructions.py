"""Tasks from instruction rows: a language model separates what the task is from what is particular to a row.

In: files of {"instruction", "input", "output"} rows, as Alpaca has them. Out: a JSONL file for `data.files` in which
rows with the same abstract instruction are one task; NAME.rejected.jsonl, the rows that did not work out, and why.

Command:  python scripts/abstract_instructions.py rows.json --endpoint http://localhost:8000/v1 --model NAME \
              --out tasks.jsonl
          A command that was stopped goes on when it is given again. Needs pip install -e '.[instructions]'.
Details:  docs/instructions.md
"""

import asyncio
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import openai
import tyro
from openai.types.chat import ChatCompletion

from lora_gen_jax.commands import bar
from lora_gen_jax.data.jsonl import map_rows, read_rows, read_text
from lora_gen_jax.data.record_rows import SPLITS, check_text
from lora_gen_jax.data.tasks import normalize
from lora_gen_jax.errors import ConfigError, DataError, LoraGenError, OutputError
from lora_gen_jax.files import write_text

TEMPLATE = """\
You prepare training data for a model that reads the description of a task once and then answers many queries of that \
task. Below is a row of a data set: an instruction, often an input, and the right output. Separate the task from what \
is particular to the row.

"abstract" is the instruction as it would be given for a whole set of such rows: one or two plain sentences in the \
imperative, in the language of the row. It keeps whatever decides the kind and the form of the output: the language, \
the length, the format, labels to choose from. It has none of the row's names, numbers, topics or sentences, and \
neither states nor hints at the output. Similar rows should get the same words.

"query" is what is particular to the row, complete and copied word for word: the output must follow from the abstract \
and the query alone. Where there is an input, it usually is the query, and the instruction usually is abstract \
already: then copy both as they are. Where nothing is particular, make the abstract more general and let the query \
name in a few words what is asked for. The abstract does not repeat the query, and the query does not contain the \
output unless the row's instruction or input does.

Examples:
{"instruction": "Give a synonym of the word 'happy'.", "input": "", "output": "joyful"}
-> {"abstract": "Name a synonym of the word.", "query": "happy"}
{"instruction": "Translate the sentence into French.", "input": "I am late.", "output": "Je suis en retard."}
-> {"abstract": "Translate the sentence into French.", "query": "I am late."}
{"instruction": "Write two sentences about why bees matter.", "input": "", "output": "Bees pollinate crops. …"}
-> {"abstract": "Write two sentences about why something matters.", "query": "bees"}
{"instruction": "Tell me a joke.", "input": "", "output": "Why did the …"}
-> {"abstract": "Write a short text that makes the reader laugh.", "query": "a joke"}

{form}

{rows}
"""
FORMS = (
    'Reply with one JSON object and nothing else: {"abstract": "…", "query": "…"}',
    'There are several rows, numbered by "row". Reply with one JSON object and nothing else, with an entry for each: '
    '{"rows": [{"row": 1, "abstract": "…", "query": "…"}, …]}',
)
"""What {form} becomes, for one row and for several."""
MAX_ABSTRACT, QUERY_SLACK = 600, 100
"""Characters of an abstract instruction, and those that a query may be longer than its row."""
OPPOSITES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}

Row = dict[str, str]


@dataclass(frozen=True)
class Flags:
    """Turns rows of instruction data into tasks: each instruction becomes an abstract one, and a query."""

    rows: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON or JSONL files of {"instruction", "input", "output"}."""
    endpoint: str
    """Base address of an endpoint that speaks OpenAI's protocol; /v1 is added to a bare host."""
    model: str
    """The model's name there."""
    out: Path
    """The .jsonl file to write. NAME.rejected.jsonl gets the rows that did not work out, NAME.partial.jsonl those that
    are finished while others are not."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key; without a value no key is sent."""
    template: Path | None = None
    """A prompt of your own, with {rows} for the rows and {form} for the form of the reply."""
    rows_per_request: int = 1
    """Rows in one request. More of them make fewer requests, and more mistakes of small models."""
    concurrency: int = 4
    """Requests at the same time."""
    attempts: int = 3
    """Replies to a row before it is rejected; the model is told each time what was wrong."""
    limit: int | None = None
    """Take the first N rows."""
    timeout: float = 120.0
    """Seconds to wait for a reply."""
    retries: int = 6
    """How often a request is sent again after a temporary error."""
    dry_run: bool = False
    """Print the first request and send none."""

    def __post_init__(self) -> None:
        for name in ("rows_per_request", "concurrency", "attempts", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is {value}; it must be at least 1", field=flag)
        if not re.match(r"https?://[^/@\s]+(/|$)", self.endpoint):
            raise ConfigError(
                f"--endpoint is {self.endpoint.rpartition('@')[2]!r}",
                field="--endpoint",
                remedy="give an address such as http://localhost:8000/v1, and a key through --api-key-env",
            )
        if self.out.suffix != ".jsonl":
            raise ConfigError(f"--out is {self.out}", field="--out", remedy="name a .jsonl file")

    def output(self, kind: str) -> Path:
        return self.out.with_name(f"{self.out.stem}.{kind}.jsonl")


def source_row(_: int, row: dict[str, Any]) -> Row:
    """The fields that are read, checked; `input` may be missing."""
    if "instruction" not in row and ("system" in row or "messages" in row):
        raise DataError(
            'rows with "system" or "messages" are tasks already', field="instruction", remedy="use them as --data.files"
        )
    texts: dict[str, Any] = {name: row.get(name) for name in ("instruction", "input", "output")}
    texts["input"] = "" if texts["input"] is None else texts["input"]
    for name, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f'"{name}" must be text, found {type(value).__name__}', field=name)
        check_text(value, name)
    if (split := row.get("split")) is not None:
        if split not in SPLITS:
            raise DataError(f'"split" is {split!r}; it must be one of {", ".join(SPLITS)}', field="split")
        texts["split"] = split
    return texts


def first_messages(template: str, rows: Sequence[Row]) -> list[Any]:
    """The conversation that asks for these rows."""
    shown = [{name: text for name, text in row.items() if name != "split"} for row in rows]
    many = len(rows) > 1
    lines = [json.dumps({"row": n} | row if many else row, ensure_ascii=False) for n, row in enumerate(shown, 1)]
    texts = {"{rows}": "\n".join(lines), "{form}": FORMS[many]}
    # Both at once, since a row may contain the text {form}.
    return [{"role": "user", "content": re.sub(r"\{rows\}|\{form\}", lambda match: texts[match[0]], template)}]


def read_reply(text: str, rows: Mapping[int, Row], many: bool) -> tuple[dict[int, Row], dict[int, str]]:
    """(outcomes, problems) by the row's number in the request; together they cover all of `rows`."""
    try:
        found = reply_entries(reply_object(text), rows, many)
    except DataError as error:
        return {}, dict.fromkeys(rows, str(error))
    outcomes, problems = {}, {}
    for number, row in rows.items():
        entry = found.get(number)
        problem = 'it is missing in "rows"' if entry is None else problem_with(entry, row)
        if problem or entry is None:
            problems[number] = problem
        else:
            outcomes[number] = {name: entry[name].strip() for name in ("abstract", "query")}
    return outcomes, problems


def reply_object(text: str) -> dict[str, Any]:
    """The first JSON object in a reply, which may stand in a Markdown fence, among words, or after <think>."""
    text = text.rpartition("</think>")[2]
    for match in list(re.finditer(r"\{", text))[:20]:
        try:
            return json.JSONDecoder().raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            pass
    raise DataError("the reply is not a JSON object")


def reply_entries(reply: dict[str, Any], rows: Mapping[int, Row], many: bool) -> dict[int, Any]:
    """The entry of each row, by number; entries without numbers are in the rows' order if none is missing."""
    if not many:
        return {1: reply}
    entries = reply.get("rows")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError('the reply has no list "rows" of objects')
    if not any("row" in entry for entry in entries) and len(entries) == len(rows):
        return dict(zip(rows, entries, strict=True))
    numbers = [entry.get("row") for entry in entries]
    if not all(type(number) is int for number in numbers) or len(set(numbers)) < len(numbers):
        raise DataError('each entry of "rows" needs the number "row" of its row, and no two may share one')
    return dict(zip(numbers, entries, strict=True))


def problem_with(entry: Mapping[str, Any], row: Row) -> str:
    """What is wrong with the model's entry for a row, said to the model; "" if nothing is."""
    for name in ("abstract", "query"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            return f'"{name}" must be a text that is not empty'
        try:
            check_text(entry[name], name)
        except DataError as error:
            return str(error)
    abstract, query, output = entry["abstract"].strip(), entry["query"].strip(), row["output"]
    given = f"{row['instruction']}\n{row['input']}"
    if len(abstract) > (longest := max(MAX_ABSTRACT, len(row["instruction"]))):
        return f'"abstract" has {len(abstract)} characters, at most {longest} are allowed'
    if len(query) > len(given) + QUERY_SLACK:
        return '"query" is much longer than the row\'s instruction and input together'
    if contains(abstract, query):
        return '"abstract" contains the whole "query", which is particular to the row'
    # Labels to choose from are part of the instruction, and belong in the abstract one.
    if contains(abstract, output) and not contains(row["instruction"], output):
        opposite = OPPOSITES.get(normalize(output))
        if opposite is None or not contains(abstract, opposite):
            return '"abstract" contains the row\'s output'
    if contains(query, output) and not contains(given, output):
        return '"query" contains the row\'s output, which its instruction and input do not'
    return ""


def contains(text: str, part: str) -> bool:
    """Whether the words of `part` occur in `text`, whatever their case and punctuation.

    Single letters are not looked for: they are articles, or letters of options.
    """
    text, part = normalize(text), normalize(part)
    if len(part) == 1 and spaced(part) and not part.isdigit():
        return False
    for match in re.finditer(f"(?={re.escape(part)})", text):
        start, end = match.start(), match.start() + len(part)
        inside = start > 0 and spaced(text[start - 1]) and spaced(part[0])
        if not (inside or (end < len(text) and spaced(text[end]) and spaced(part[-1]))):
            return True
    return False


def spaced(character: str) -> bool:
    """Whether this script puts spaces between words; one without upper case is taken not to."""
    return character.isdigit() or character.lower() != character.upper()


class Endpoint:
    """A chat endpoint. The client itself retries temporary errors and waits as long as Retry-After says.

    Until the first reply, a refusal is blamed on the settings: optional fields are left out one by one. Afterwards it
    is blamed on the rows in the request, and raised as `openai.APIStatusError`.
    """

    def __init__(self, flags: Flags):
        key = os.environ.get(flags.api_key_env, "").strip() if flags.api_key_env else ""
        if not (key.isascii() and (not key or key.isprintable())):
            raise ConfigError(
                f"--api-key-env: {flags.api_key_env} contains characters that no key has", field="--api-key-env"
            )
        base = flags.endpoint.rstrip("/").removesuffix("/chat/completions")
        self.flags, self.answered = flags, False
        self.headers: dict[str, Any] = {} if key else {"Authorization": openai.Omit()}
        self.optional: dict[str, Any] = {"response_format": {"type": "json_object"}, "temperature": 0, "max_tokens": 0}
        self.client = openai.AsyncOpenAI(
            base_url=base if "/" in base.partition("//")[2] else f"{base}/v1",
            api_key=key or "none",
            timeout=flags.timeout,
            # A redirected POST becomes a GET.
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    def body(self, messages: list[Any], rows: Sequence[Row]) -> dict[str, Any]:
        """What is sent; a query may be as long as its row, and few tokens are shorter than a character."""
        room = sum(512 + len(row["instruction"]) + len(row["input"]) for row in rows)
        optional = self.optional | ({"max_tokens": room} if "max_tokens" in self.optional else {})
        return {"model": self.flags.model, "messages": messages} | optional

    async def reply(self, messages: list[Any], rows: Sequence[Row]) -> str:
        """The reply's text; "" where the model gave none."""
        # A wrong address is reported soon; an endpoint that has answered gets more patience.
        retries = self.flags.retries if self.answered else min(2, self.flags.retries)
        client = self.client.with_options(max_retries=retries)
        try:
            made = await client.chat.completions.create(**self.body(messages, rows), extra_headers=self.headers)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if self.answered:
                raise
            named = [name for name in self.optional if name in str(error)]
            named = named or [name for name in self.optional if name == "response_format"]
            if not named:
                raise self.failed(error) from error
            print(f"the endpoint refuses {named[0]} ({error}); going on without it", file=sys.stderr)
            del self.optional[named[0]]
            return await self.reply(messages, rows)
        except openai.APIError as error:
            raise self.failed(error) from error
        if not isinstance(made, ChatCompletion) or not made.choices:
            raise self.failed(f"it answered with something other than a chat completion: {str(made)[:300]!r}")
        self.answered = True
        return made.choices[0].message.content or ""

    def failed(self, error: Exception | str) -> LoraGenError:
        """An error that names the flag to look at; finished rows are kept."""
        remedy, field = "Once it works again, the same command goes on", "--endpoint"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            remedy, field = "put a valid key into the variable that --api-key-env names", "--api-key-env"
            remedy += f", {self.flags.api_key_env}" if self.flags.api_key_env else ""
        elif isinstance(error, openai.NotFoundError):
            remedy = f"check the address, and that it has a model {self.flags.model!r} (--model)"
        elif isinstance(error, openai.APIConnectionError) and not self.answered:
            remedy = "check the address and that the server is running"
        return LoraGenError(f"--endpoint {self.flags.endpoint}: {error}", field=field, remedy=remedy)


async def ask(endpoint: Endpoint, template: str, rows: Sequence[Row]) -> list[Row]:
    """Asks for the rows in one conversation, with corrections; gives an outcome for each."""
    outcomes: dict[int, Row] = {}
    numbered, reply, many = dict(enumerate(rows, 1)), "", len(rows) > 1
    messages, problems = first_messages(template, rows), dict.fromkeys(numbered, "")
    for _ in range(endpoint.flags.attempts):
        try:
            reply = await endpoint.reply(messages, [numbered[n] for n in problems])
        except openai.APIStatusError as error:
            if many:  # one of the rows may be to blame
                found = [await ask(endpoint, template, [numbered[n]]) for n in problems]
                outcomes |= dict(zip(problems, (one for (one,) in found), strict=True))
            else:
                outcomes[1] = {"rejected": f"the endpoint refused the request: {error}", "reply": ""}
            problems = {}
            break
        fresh, problems = read_reply(reply, {n: numbered[n] for n in problems}, many)
        outcomes |= fresh
        if not problems:
            break
        which = "; ".join(f"row {n}: {problem}" for n, problem in problems.items()) if many else problems[1]
        again = f"with the rows {', '.join(map(str, problems))} only" if many else "corrected, and nothing else"
        # Some endpoints refuse empty turns.
        messages.append({"role": "assistant", "content": reply.strip() or "{}"})
        correction = f"This cannot be used: {which}. Send the JSON object again, {again}."
        messages.append({"role": "user", "content": correction})
    rejected = {n: {"rejected": problem, "reply": reply[:2000]} for n, problem in problems.items()}
    return [(outcomes | rejected)[n] for n in numbered]


async def ask_all(
    endpoint: Endpoint, template: str, batches: Sequence[Mapping[int, Row]], done: Callable[[dict[int, Row]], None]
) -> None:
    """Several requests at a time, after the first, which shows what the endpoint accepts."""
    waiting: Iterator[Mapping[int, Row]] = iter(batches)

    async def work(count: int | None = None) -> None:
        for batch in waiting if count is None else [next(waiting)]:
            outcomes = await ask(endpoint, template, list(batch.values()))
            done(dict(zip(batch, outcomes, strict=True)))

    if batches:
        async with endpoint.client:
            await work(1)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(endpoint.flags.concurrency):
                        group.create_task(work())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None


class Partial:
    """Finished rows on disk: a first line that says what they depend on, then a line for each.

    An unfinished last line, from a kill, is cut off.
    """

    def __init__(self, path: Path, identity: dict[str, str]):
        self.path, self.done = path, {}
        data = path.read_bytes() if path.exists() else b""
        head = json.dumps(identity)
        complete = data[: data.rfind(b"\n") + 1]
        lines = complete.decode("utf-8", "replace").splitlines()
        if lines[:1] != [head] and not head.encode().startswith(data):
            raise DataError(self._other(lines, identity), field="--out", remedy="choose another --out, or remove it")
        for number, line in enumerate(lines[1:], 2):
            try:
                outcome = json.loads(line)
                if not outcome.get("rejected") and not (outcome["abstract"] and outcome["query"]):
                    raise ValueError
                self.done[int(outcome.pop("row"))] = outcome
            except (ValueError, KeyError, AttributeError) as error:
                raise DataError(f"{path}:{number} is damaged", remedy="remove this line to ask again") from error
        if complete or data:
            with path.open("r+b") as file:
                file.truncate(len(complete))
        self.head = "" if lines else head + "\n"

    def _other(self, lines: list[str], identity: dict[str, str]) -> str:
        try:
            found = json.loads(lines[0])
            other = " and another ".join(name for name, value in identity.items() if found[name] != value)
        except (ValueError, IndexError, KeyError, TypeError):
            return f"{self.path} is not a file of finished rows"
        return f"{self.path} holds finished rows of another {other}"

    def add(self, outcomes: dict[int, Row]) -> None:
        self.done |= outcomes
        with self.path.open("ab") as file:
            lines = "".join(json.dumps({"row": row} | outcome) + "\n" for row, outcome in outcomes.items())
            file.write((self.head + lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self.head = ""


def task_name(abstract: str) -> str:
    """A few words and a hash; the same for texts that differ only in case and punctuation."""
    key = normalize(abstract)
    slug = "-".join(re.findall(r"[a-z0-9]+", unicodedata.normalize("NFKD", key)))[:40].strip("-") or "task"
    return f"{slug}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"


def write_tasks(flags: Flags, rows: Sequence[Row], outcomes: Sequence[Row]) -> None:
    """The rejected rows, then the tasks, worded as in their first row; and a summary."""
    wordings: dict[str, str] = {}
    tasks, rejected = [], []
    for row, outcome in zip(rows, outcomes, strict=True):
        if reason := outcome.get("rejected"):
            rejected.append(row | {"reason": reason} | ({"reply": reply} if (reply := outcome.get("reply")) else {}))
            continue
        name = task_name(outcome["abstract"])
        system = wordings.setdefault(name, outcome["abstract"])
        task = {"task": name, "system": system, "input": outcome["query"], "output": row["output"]}
        tasks.append(task | ({"split": row["split"]} if "split" in row else {}))
    said = f"; {len(rejected)} rows were rejected, see {flags.output('rejected')}" if rejected else ""
    for path, lines in ((flags.output("rejected"), rejected), (flags.out, tasks)):
        if lines:
            write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if not tasks:
        raise DataError(f"none of the {len(rows)} rows worked out{said}", remedy="try a more capable --model")
    single = sum(size == 1 for size in Counter(task["task"] for task in tasks).values())
    print(f"{flags.out}: {len(tasks)} rows of {len(wordings)} tasks, {single} with a single row{said}", file=sys.stderr)


def run(flags: Flags) -> None:
    """Asks for all rows that are not finished, and writes the files."""
    template = TEMPLATE if flags.template is None else read_text(flags.template)
    if not ("{rows}" in template and "{form}" in template):
        raise DataError(f"--template {flags.template} needs both {{rows}} and {{form}}", field="--template")
    endpoint = Endpoint(flags)
    rows = [row for path in flags.rows for row in map_rows(path, read_rows(path), source_row)][: flags.limit]
    reasons = {i: name for i, row in enumerate(rows) for name in ("output", "instruction") if not row[name].strip()}
    empty = {i: {"rejected": f'"{name}" is empty', "reply": ""} for i, name in reasons.items()}
    if flags.dry_run:
        first = [row for i, row in enumerate(rows) if i not in empty][: flags.rows_per_request]
        print(json.dumps(endpoint.body(first_messages(template, first), first), indent=2, ensure_ascii=False))
        return
    partial_path = flags.output("partial")
    for path in (flags.out, *([] if partial_path.exists() else [flags.output("rejected")])):
        if path.exists():
            raise OutputError(f"output {path} already exists", field="--out", remedy="choose another --out")
    digests = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in (json.dumps(rows), template)]
    identity = {"rows (files or --limit)": digests[0], "--model": flags.model, "prompt (--template)": digests[1]}
    partial = Partial(partial_path, identity)
    waiting = [i for i in range(len(rows)) if i not in partial.done and i not in empty]
    size = flags.rows_per_request
    batches = [{i: rows[i] for i in waiting[start : start + size]} for start in range(0, len(waiting), size)]
    with bar("abstracting", len(rows)) as progress:

        def done(outcomes: dict[int, Row]) -> None:
            partial.add(outcomes)
            progress(len(partial.done | empty), len(rows))

        progress(len(partial.done | empty), len(rows))
        asyncio.run(ask_all(endpoint, template, batches, done))
    write_tasks(flags, rows, [(empty | partial.done)[i] for i in range(len(rows))])
    partial.path.unlink(missing_ok=True)


def main(args: Sequence[str] | None = None) -> None:
    try:
        run(tyro.cli(Annotated[Flags, tyro.conf.FlagCreatePairsOff], args=args))  # type: ignore
    except (LoraGenError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
