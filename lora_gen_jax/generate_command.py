"""The command ``generate``: one answer as a stream, or a file of requests for many specializations.

In: flags. Out: text on standard output, or a JSONL file. Heavy imports wait until a command runs, so that ``--help``
and mistakes answer at once.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_gen_jax.errors import CheckpointError, ConfigError, DataError, OutputError
from lora_gen_jax.files import is_directory, write_text, writing

if TYPE_CHECKING:
    from lora_gen_jax.generator.router import Gates
    from lora_gen_jax.inference.work import Factors, GenerationRequest
    from lora_gen_jax.models import Model


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answers with a specialized edge model, which does not read the prompt again.

    One --input is answered as a stream on standard output. A file of --requests, for as many specializations as you
    like, becomes a file of answers. Examples:

    lora-gen generate --specialization special --input "owl:"

    lora-gen generate --requests requests.jsonl --out answers.jsonl
    """

    specialization: Path | None = None
    """Directory that `specialize` wrote. With --requests, for those that name none; and names are looked up in it,
    where `specialize --prompts` wrote it."""
    input: str | None = None
    """What the edge model reads, or @FILE to read it from a file."""
    requests: Path | None = None
    """A JSONL file, {"input": text, "specialization": directory or name} a line; without "specialization" the base
    model answers, unless --specialization is one. Other fields are kept."""
    out: Path | None = None
    """With --requests: the JSONL file to write, the requests with "answer" and "finish" ("stop" or "length")."""
    checkpoint: Path | None = None
    """Where the generator with the expert pool is, if not where it was when the specialization was made."""
    trust_recorded: bool = False
    """Open the generator's address that the specialization records in a bucket or on the hub, too, with your own
    credentials."""
    edge: str | None = None
    """Where the edge model is, if not where it was when the generator was trained."""
    max_new_tokens: int = 64
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the most probable token; higher values vary more."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 means all."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together reach this probability."""
    seed: int = 0
    """Of the draws; request i of a file draws with seed + i."""
    chat: bool = False
    """Put every input into the edge model's chat template, as a user's turn."""
    base: bool = False
    """Answer with the unspecialized edge model, for comparison."""
    rows: int = 32
    """With --requests: sequences at the same time."""
    how: Literal["auto", "mixed", "merged"] = "auto"
    """With --requests: all specializations in one batch beside the unmerged weights, or merged one after another; auto
    takes what is likely to be faster."""

    def __post_init__(self) -> None:
        if (self.input is None) == (self.requests is None):
            found = "neither" if self.input is None else "input and requests"
            problem = f"give one of --input and --requests; found {found}"
            raise ConfigError(problem, field="--input", code="count")
        for name in ("out", "rows", "how") if self.requests is None else ():
            if getattr(self, name) != getattr(Generate, name):
                problem = f"--{name} is for --requests; an --input is answered on standard output"
                raise ConfigError(problem, field=f"--{name}")
        needed = "out" if self.input is None else "specialization"
        if getattr(self, needed) is None:
            remedy = "name the JSONL file to write" if needed == "out" else "name the directory that `specialize` wrote"
            raise ConfigError(f"--{needed} is missing", field=f"--{needed}", code="missing", remedy=remedy)


def generate_command(flags: Generate) -> None:
    """Checks what costs nothing first, then loads the edge model and answers."""
    from lora_gen_jax.inference.sampling import Sampling

    Sampling(flags.temperature, flags.top_k, flags.top_p).check()
    if flags.requests is not None:
        _answer_requests(flags, flags.requests)
    elif flags.specialization is not None:
        _answer_one(flags, flags.specialization)


def _answer_one(flags: Generate, directory: Path) -> None:
    """Merges the specialization into the edge model, or puts it beside quantized weights, and streams its answer."""
    from lora_gen_jax.adapters.merge import merge_donated
    from lora_gen_jax.adapters.specialization_fit import fitted_adapter
    from lora_gen_jax.data.text_stream import TextStream
    from lora_gen_jax.files import text_argument
    from lora_gen_jax.inference.decode import GenerationSettings, stream
    from lora_gen_jax.inference.sampling import Sampling
    from lora_gen_jax.models import end_ids, load_model
    from lora_gen_jax.sharding import evaluation_mesh
    from lora_gen_jax.specializer import read_specialization

    assert flags.input is not None
    text = text_argument(flags.input, "--input")
    specialization, loaded, config = read_specialization(directory, flags.checkpoint, flags.edge, flags.trust_recorded)
    edge = load_model(config.edge, evaluation_mesh(config.mesh.fsdp))
    model = edge.plain
    if not flags.base:
        adapter = fitted_adapter(specialization, loaded.variables, config.generator)
        # Merged, the base is not needed any more.
        merged = edge.weights is None
        model = model.replace(params=merge_donated(edge.params, adapter)) if merged else model.replace(adapter=adapter)
    sampling, stop_ids = Sampling(flags.temperature, flags.top_k, flags.top_p), end_ids(config.edge.source, edge)
    settings = GenerationSettings(flags.max_new_tokens, stop_ids, sampling, flags.seed % 2**32)
    tokens = stream(model, [_ids(edge, text, flags.chat)], settings)
    shown = TextStream(edge.encoder)
    for (token,) in tokens:
        print(shown.push([] if token is None else [token]), end="", flush=True)
    print(shown.finish())


def _answer_requests(flags: Generate, path: Path) -> None:
    """Answers a file of requests, all of them or none."""
    from lora_gen_jax.adapters.refined import RefinedPool
    from lora_gen_jax.adapters.specialization_fit import fitted_adapter
    from lora_gen_jax.commands import bar
    from lora_gen_jax.inference.mixture import answer_all
    from lora_gen_jax.models import load_model
    from lora_gen_jax.sharding import evaluation_mesh
    from lora_gen_jax.specializer import read_specializations

    out = _check_out(flags)
    rows, places = _read_requests(flags, path)
    directories = [place for place in places if place is not None]
    if not directories:
        problem, remedy = "no request names a specialization", "name one in the file, or with --specialization"
        raise ConfigError(problem, field="--specialization", code="none", remedy=remedy)
    found, loaded, config = read_specializations(directories, flags.checkpoint, flags.edge, flags.trust_recorded)
    first = found[directories[0]]
    if first.direct:
        problem = f"{directories[0]} has factors instead of gates (direct generation), which are not mixed"
        remedy = "answer each with --input, or export it"
        raise CheckpointError(problem, field="--specialization", code="direct", remedy=remedy)
    edge = load_model(config.edge, evaluation_mesh(config.mesh.fsdp))
    # Rows have room for as many gates as the pool's own.
    most = max(found.values(), key=lambda one: one.active)
    adapter = fitted_adapter(most, loaded.variables, config.generator)
    pool = adapter.generated if isinstance(adapter, RefinedPool) else adapter
    updates = {place: (one.gates(config.generator.num_experts), one.factors) for place, one in found.items()}
    asked: list[tuple[str, tuple[Gates, Factors] | None]] = [
        (row["input"], None if place is None else updates[place]) for row, place in zip(rows, places, strict=True)
    ]
    works = _works(flags, edge, config.edge.source, asked)
    began = time.monotonic()
    with bar("answering", len(works)) as progress:
        model = edge.plain.replace(adapter=pool)
        answers = answer_all(model, works, rows=flags.rows, how=flags.how, progress=progress)
    seconds = time.monotonic() - began
    lines = [
        json.dumps({**row, "answer": edge.encoder.decode(answer.ids), "finish": answer.finish}, ensure_ascii=False)
        for row, answer in zip(rows, answers, strict=True)
    ]
    write_text(out, "".join(line + "\n" for line in lines))
    count = sum(len(answer.ids) for answer in answers)
    print(
        f"{out}: {len(answers)} answers of {len(found)} specializations in {seconds:.1f} s,"
        f" {len(answers) / seconds:.1f} answers/s, {count / seconds:.0f} tokens/s",
        file=sys.stderr,
    )


def _check_out(flags: Generate) -> Path:
    """Where the answers go, noticed before anything is computed."""
    out, folder = flags.out, flags.specialization
    assert out is not None
    if out.exists():
        remedy = "choose another, or remove it first"
        raise OutputError(f"--out {out} already exists", field="--out", code="exists", remedy=remedy)
    if folder is not None and not is_directory(folder):
        problem, remedy = f"--specialization {folder} is not a directory", "name one that `specialize` wrote"
        raise CheckpointError(problem, field="--specialization", code="no directory", remedy=remedy)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _read_requests(flags: Generate, path: Path) -> tuple[list[dict[str, Any]], list[Path | None]]:
    """The requests, and the specialization directory of each; None for the base model."""
    from lora_gen_jax.data.jsonl import map_rows, read_rows

    rows = read_rows(path)
    places = map_rows(path, rows, lambda _, row: _place(flags, row))
    return [row for _, row in rows], places


def _place(flags: Generate, row: dict[str, Any]) -> Path | None:
    from lora_gen_jax.adapters.specialization import TENSORS
    from lora_gen_jax.data.record_rows import text_field

    text_field(row, "input")
    for name in ("answer", "finish"):
        if name in row:
            problem = f'"{name}" is already there, and would be written over'
            raise DataError(problem, field=name, code="taken", remedy="call it something else")
    try:  # what can be read, but not be written as JSON again: NaN, and half of a surrogate pair
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        remedy = "write null for NaN, and save the file as UTF-8"
        raise DataError(f"a field cannot be written as JSON ({error})", code="json", remedy=remedy) from error
    named, folder = row.get("specialization"), flags.specialization
    if named is None:
        return folder if folder is not None and (folder / TENSORS).is_file() else None
    if not isinstance(named, str) or not named:
        problem = f'"specialization" must be a directory or a name, found {named!r}'
        raise DataError(problem, field="specialization", code="type")
    for place in ([] if folder is None else [folder / named]) + [Path(named)]:
        if is_directory(place):
            return place
    below = "" if folder is None else f", neither below {folder}"
    problem = f"there is no specialization directory {named[:200]}{below}"
    raise DataError(problem, field="specialization", code="missing", remedy="write it with `specialize`")


def _works(
    flags: Generate, edge: "Model", source: str, asked: "list[tuple[str, tuple[Gates, Factors] | None]]"
) -> "list[GenerationRequest]":
    """A work for each input and its specialization's gates and factors."""
    from lora_gen_jax.inference.decode import GenerationSettings
    from lora_gen_jax.inference.sampling import Sampling
    from lora_gen_jax.inference.work import GenerationRequest
    from lora_gen_jax.models import end_ids

    stop_ids, sampling = end_ids(source, edge), Sampling(flags.temperature, flags.top_k, flags.top_p)
    return [
        GenerationRequest(
            ids=_ids(edge, text, flags.chat),
            settings=GenerationSettings(flags.max_new_tokens, stop_ids, sampling, (flags.seed + i) % 2**32),
            gates=None if flags.base or update is None else update[0],
            factors={} if flags.base or update is None else update[1],
        )
        for i, (text, update) in enumerate(asked)
    ]


def _ids(edge: "Model", text: str, chat: bool) -> list[int]:
    # As in training, where queries end without whitespace: a file's last line break would change the answer.
    text = text.rstrip()
    return edge.encoder.chat([{"role": "user", "content": text}]) if chat else edge.encoder.text(text)
