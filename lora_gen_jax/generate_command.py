"""The command ``generate``: one answer as a stream, or a file of requests for many specialisations.

In: flags. Out: text on standard output, or a JSONL file. Heavy imports wait until a command runs, so that ``--help``
and mistakes answer at once.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_gen_jax.errors import CheckpointError, ConfigError, DataError, OutputError

if TYPE_CHECKING:
    from lora_gen_jax.adapters.specialization import Specialization
    from lora_gen_jax.inference.decode import Generation
    from lora_gen_jax.models import Model


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answers with a specialised edge model, which does not read the prompt again.

    One --input is answered as a stream on standard output. A file of --requests, for as many specialisations as you
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
    """With --requests: the JSONL file to write, the requests with "output" and "finish"."""
    checkpoint: Path | None = None
    """Where the generator with the expert pool is, if not where it was when the specialisation was made."""
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
    """Answer with the unspecialised edge model, for comparison."""
    rows: int = 32
    """With --requests: sequences at the same time."""
    how: Literal["auto", "mixed", "merged"] = "auto"
    """With --requests: all specialisations in one batch beside the unmerged weights, or merged one after another; auto
    takes what is likely to be faster."""


def generate_command(flags: Generate) -> None:
    """Checks what costs nothing first, then loads the edge model and answers."""
    from lora_gen_jax.inference.sampling import Sampling

    given = [name for name in ("input", "requests") if getattr(flags, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"give one of --input and --requests; found {' and '.join(given) or 'neither'}")
    Sampling(flags.temperature, flags.top_k, flags.top_p).check()
    if flags.requests is not None:
        _answer_requests(flags)
        return
    for name in ("out", "rows", "how"):
        if getattr(flags, name) != getattr(Generate(), name):
            raise ConfigError(f"--{name} is for --requests; an --input is answered on standard output")
    if flags.specialization is None:
        raise ConfigError("--specialization is missing: name the directory that `specialize` wrote")
    _answer_one(flags, flags.specialization)


def _answer_one(flags: Generate, directory: Path) -> None:
    """Merges the specialisation into the edge model and streams its answer."""
    from lora_gen_jax.adapters.merge import merge
    from lora_gen_jax.adapters.specialization import adapter_of
    from lora_gen_jax.data.text_stream import TextStream
    from lora_gen_jax.files import text_argument
    from lora_gen_jax.inference.decode import stream
    from lora_gen_jax.inference.sampling import Sampling
    from lora_gen_jax.models import load_model
    from lora_gen_jax.specializer import read_specialization
    from lora_gen_jax.training.checkpoint import check_models

    assert flags.input is not None
    text = text_argument(flags.input, "--input")
    # A wrong pool is noticed before the model is read.
    specialization, loaded, config = read_specialization(directory, flags.checkpoint, flags.edge)
    edge = load_model(config.edge)
    found = {**specialization.fingerprints, "edge": edge.fingerprint}
    check_models(specialization.fingerprints, found, f"specialisation {directory}")
    adapter = adapter_of(specialization, loaded.variables, config.generator, edge.config.num_layers)
    tokens = stream(
        edge.decoder,
        edge.params if flags.base else merge(edge.params, adapter),
        [_ids(edge, text, flags.chat)],
        max_new_tokens=flags.max_new_tokens,
        stop_ids=_stop_ids(edge),
        sampling=Sampling(flags.temperature, flags.top_k, flags.top_p),
        seed=flags.seed,
    )
    shown = TextStream(edge.encoder)
    for (token,) in tokens:
        print(shown.push([] if token is None else [token]), end="", flush=True)
    print(shown.finish())


def _answer_requests(flags: Generate) -> None:
    from lora_gen_jax.adapters.specialization import adapter_of, check_pool
    from lora_gen_jax.data.jsonl import read_rows
    from lora_gen_jax.inference.engine import Work
    from lora_gen_jax.inference.mixture import answer_all
    from lora_gen_jax.models import load_model
    from lora_gen_jax.specializer import find_generator, relocate
    from lora_gen_jax.training.checkpoint import check_models

    assert flags.requests is not None
    if flags.out is None:
        raise ConfigError("--out is missing: name the JSONL file that --requests are answered in")
    if flags.out.exists():
        raise OutputError(f"--out {flags.out} exists already: choose another, or remove it first")
    rows = read_rows(flags.requests)
    places = [_place(flags, f"{flags.requests}:{line}", row) for line, row in rows]
    specializations = _load_all(places)
    if not specializations:
        raise ConfigError("no request names a specialisation: name one in the file, or with --specialization")
    first = next(iter(specializations.values()))
    loaded = find_generator(first, flags.checkpoint)
    for directory, specialization in specializations.items():
        try:
            check_pool(specialization, loaded.variables)
        except CheckpointError as error:
            raise CheckpointError(f"specialisation {directory}: {error}") from error
    config = relocate(loaded.config, None, flags.edge)
    edge = load_model(config.edge)
    for directory, specialization in specializations.items():
        found = {**specialization.fingerprints, "edge": edge.fingerprint}
        check_models(specialization.fingerprints, found, f"specialisation {directory}")
    experts = config.generator.num_experts
    gates = {directory: one.gates(experts) for directory, one in specializations.items()}
    pool = adapter_of(first, loaded.variables, config.generator, edge.config.num_layers)
    works = [
        Work(
            ids=_ids(edge, row["input"], flags.chat),
            max_new_tokens=flags.max_new_tokens,
            gates_LE=None if place is None or flags.base else gates[place],
            stop_ids=_stop_ids(edge),
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            seed=(flags.seed + i) % 2**32,
        )
        for i, ((_, row), place) in enumerate(zip(rows, places, strict=True))
    ]
    began = time.monotonic()
    answers = answer_all(edge.decoder, edge.params, pool, works, rows=flags.rows, how=flags.how)
    seconds = time.monotonic() - began
    _write(flags.out, [row for _, row in rows], answers, edge)
    count = sum(len(answer.ids) for answer in answers)
    print(
        f"{flags.out}: {len(answers)} answers of {len(specializations)} specialisations in {seconds:.1f} s,"
        f" {len(answers) / seconds:.1f} answers/s, {count / seconds:.0f} tokens/s",
        file=sys.stderr,
    )


def _place(flags: Generate, where: str, row: dict[str, Any]) -> Path | None:
    """The specialisation directory of a request; None for the base model."""
    text, named, folder = row.get("input"), row.get("specialization"), flags.specialization
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: "input" must be a text that is not empty')
    if named is None:
        single = folder is not None and (folder / "specialization.safetensors").is_file()
        return folder if single else None
    if not isinstance(named, str) or not named:
        raise DataError(f'{where}: "specialization" must be a directory or a name, found {named!r}')
    inside = None if folder is None else folder / named
    place = inside if inside is not None and inside.is_dir() else Path(named)
    if not place.is_dir():
        also = "" if folder is None else f", neither below {folder}"
        raise DataError(f"{where}: there is no specialisation directory {named}{also}: write it with `specialize`")
    return place


def _load_all(places: Sequence[Path | None]) -> "dict[Path, Specialization]":
    from lora_gen_jax.adapters.specialization import load_specialization

    return {place: load_specialization(place) for place in dict.fromkeys(places) if place is not None}


def _write(path: Path, rows: "Sequence[dict[str, Any]]", answers: "Sequence[Generation]", edge: "Model") -> None:
    lines = [
        json.dumps({**row, "output": edge.encoder.decode(answer.ids), "finish": answer.finish}, ensure_ascii=False)
        for row, answer in zip(rows, answers, strict=True)
    ]
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"--out {path} cannot be written: {error.strerror}; choose another place") from error


def _ids(edge: "Model", text: str, chat: bool) -> list[int]:
    return edge.encoder.chat([{"role": "user", "content": text}]) if chat else edge.encoder.text(text)


def _stop_ids(edge: "Model") -> list[int]:
    return [] if edge.encoder.end is None else [edge.encoder.end]
