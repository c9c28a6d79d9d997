"""The commands ``specialize``, ``generate`` and ``pack``: their flags, and what they do.

In: flags. Out: specialisation directories; an answer on standard output. Heavy imports wait until a command runs, so
that ``--help`` and mistakes answer at once.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_gen_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lora_gen_jax.data.prompt_sources import NamedPrompt
    from lora_gen_jax.specializer import Specializer


@dataclasses.dataclass(frozen=True)
class Specialize:
    """Reads a task's system prompt once and writes a specialisation of the edge model.

    The prompt is a description, a few solved examples, a tool list, a role, or any mix of them; give one of --prompt,
    --chat, --shots and --prompts. The result is a small directory that `generate` uses. Examples:

    lora-gen specialize --prompt "Give the animal's young, in brackets." --out special

    lora-gen specialize --prompts many.jsonl --out specials
    """

    out: Path
    """Directory to write; must not exist, or be empty. With --prompts it holds a directory for each of them."""
    prompt: str | None = None
    """The system prompt, or @FILE to read it from a file; with --shots, the description before them."""
    chat: Path | None = None
    """A JSON file with a conversation, [{"role", "content"}, ...]: system text, and user turns with their answers."""
    shots: Path | None = None
    """A JSONL file with a solved example a line, {"input", "output"}."""
    prompts: Path | None = None
    """A JSONL file of many: each line has "prompt", "messages" or "shots" (with "description"), and may have a "name"
    (the line's number if not)."""
    checkpoint: Path | None = None
    """A run's work directory (its newest checkpoint is taken), one checkpoints/<step> directory, or a generator that
    `pack` wrote; left out, the generator that is shipped with the package."""
    cloud: str | None = None
    """Where the cloud model is, if not where it was when the generator was trained."""
    edge: str | None = None
    """Where the edge model is, if not where it was when the generator was trained."""


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answers an input with a specialised edge model, which does not read the prompt again.

    The answer is streamed to standard output. Example:

    lora-gen generate --specialization special --input "owl:"
    """

    specialization: Path
    """Directory that `specialize` wrote."""
    input: str
    """What the edge model reads, or @FILE to read it from a file."""
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
    """Of the draws."""
    chat: bool = False
    """Put the input into the edge model's chat template, as a user's turn."""
    base: bool = False
    """Answer with the unspecialised edge model, for comparison."""


@dataclasses.dataclass(frozen=True)
class Pack:
    """Writes a trained generator as two small files that travel: without optimiser state, and in half precision.

    Example:

    lora-gen pack --checkpoint runs/quickstart --out generator
    """

    checkpoint: Path
    """A run's work directory (its newest checkpoint is taken) or one checkpoints/<step> directory."""
    out: Path
    """Directory to write; must not exist, or be empty."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the stored parameters."""


def pack_command(flags: Pack) -> None:
    """Reads the checkpoint and writes the directory."""
    import ml_dtypes
    import numpy as np

    from lora_gen_jax.files import check_output
    from lora_gen_jax.training.checkpoint import load_checkpoint
    from lora_gen_jax.training.portable import save_portable

    check_output(flags.out)
    dtype = ml_dtypes.bfloat16 if flags.dtype == "bfloat16" else np.float32
    save_portable(load_checkpoint(flags.checkpoint), flags.out, dtype)
    size = sum(path.stat().st_size for path in flags.out.iterdir())
    print(f"{flags.out}: {size / 1e3:.0f} KB", file=sys.stderr)


def specialize_command(flags: Specialize) -> None:
    """Checks what costs nothing first, then loads the models and generates."""
    from lora_gen_jax.data.prompt_sources import read_prompts
    from lora_gen_jax.files import check_output

    _check_sources(flags)
    many = None if flags.prompts is None else read_prompts(flags.prompts)
    single = _single_prompt(flags) if many is None else ""
    check_output(flags.out)
    if flags.checkpoint is None:
        print("no --checkpoint: the shipped generator for the pocket pair is used", file=sys.stderr)

    from lora_gen_jax.adapters.specialization import save_specialization
    from lora_gen_jax.sharding import evaluation_mesh
    from lora_gen_jax.specializer import Specializer

    specializer = Specializer.load(flags.checkpoint, flags.cloud, flags.edge, evaluation_mesh())
    if many is not None:
        _specialize_many(specializer, many, flags)
        return
    (made,) = specializer.specialize([single])
    save_specialization(made, flags.out)
    size = (flags.out / "specialization.safetensors").stat().st_size
    print(f"{flags.out}: {len(specializer.ids(single))} prompt tokens became {size} bytes", file=sys.stderr)


def _check_sources(flags: Specialize) -> None:
    """Raises ConfigError unless one source of prompts is named; --prompt may stand beside --shots."""
    given = [name for name in ("prompt", "chat", "shots", "prompts") if getattr(flags, name) is not None]
    if len(given) != 1 and given != ["prompt", "shots"]:
        found = " and ".join(f"--{name}" for name in given) or "none of them"
        raise ConfigError(
            f"give one of --prompt, --chat, --shots and --prompts (--prompt may describe --shots); found {found}"
        )


def _single_prompt(flags: Specialize) -> str:
    from lora_gen_jax.data.prompt_sources import read_chat, read_shots
    from lora_gen_jax.files import text_argument

    text = "" if flags.prompt is None else text_argument(flags.prompt, "--prompt")
    if flags.chat is not None:
        return read_chat(flags.chat)
    return text if flags.shots is None else read_shots(flags.shots, text)


def _specialize_many(specializer: "Specializer", prompts: "Sequence[NamedPrompt]", flags: Specialize) -> None:
    """A specialisation directory for every prompt, below --out; a bar on a terminal, and a last line."""
    from rich.console import Console
    from rich.progress import Progress

    from lora_gen_jax.adapters.specialization import save_specializations

    began, console = time.monotonic(), Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("specialising", total=len(prompts))
        try:
            made = specializer.specialize(
                [prompt.text for prompt in prompts], lambda done, _: progress.update(bar, completed=done)
            )
        except DataError as error:
            raise DataError(f"{flags.prompts}: {error}") from error
    save_specializations(((prompt.name, one) for prompt, one in zip(prompts, made, strict=True)), flags.out)
    seconds, size = time.monotonic() - began, sum(x.nbytes for one in made for x in one.tensors.values())
    what = "factors" if made[0].direct else "gates"
    print(
        f"{flags.out}: {len(made)} specialisations in {seconds:.1f} s, {len(made) / seconds:.1f} prompts/s,"
        f" {size} bytes of {what}",
        file=sys.stderr,
    )


def generate_command(flags: Generate) -> None:
    """Merges the specialisation into the edge model and streams its answer."""
    from lora_gen_jax.adapters.merge import merge
    from lora_gen_jax.adapters.specialization import adapter_of
    from lora_gen_jax.files import text_argument
    from lora_gen_jax.inference.decode import stream
    from lora_gen_jax.inference.sampling import Sampling
    from lora_gen_jax.models import load_model
    from lora_gen_jax.specializer import read_specialization
    from lora_gen_jax.training.checkpoint import check_models

    text = text_argument(flags.input, "--input")
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p).checked()
    # A wrong pool is noticed before the model is read.
    specialization, loaded, config = read_specialization(flags.specialization, flags.checkpoint, flags.edge)
    edge = load_model(config.edge)
    found = {**specialization.fingerprints, "edge": edge.fingerprint}
    check_models(specialization.fingerprints, found, f"specialisation {flags.specialization}")
    adapter = adapter_of(specialization, loaded.variables, config.generator, edge.config.num_layers)
    params = edge.params if flags.base else merge(edge.params, adapter)
    ids = edge.encoder.chat([{"role": "user", "content": text}]) if flags.chat else edge.encoder.text(text)
    stop = [edge.encoder.end] if edge.encoder.end is not None else []
    tokens = stream(
        edge.decoder,
        params,
        [ids],
        max_new_tokens=flags.max_new_tokens,
        stop_ids=stop,
        sampling=sampling,
        seed=flags.seed,
    )
    shown, new = "", []
    for (token,) in tokens:
        new.append(token)
        so_far = edge.encoder.decode(new)
        # Bytes of a character that is not complete yet decode to a replacement mark.
        if not so_far.endswith("\ufffd"):
            print(so_far[len(shown) :], end="", flush=True)
            shown = so_far
    print()
