"""The commands ``specialize`` and ``pack``: their flags, and what they do.

In: flags. Out: specialisation directories; a generator that travels. Heavy imports wait until a command runs, so that
``--help`` and mistakes answer at once.
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

    lora-gen specialize --checkpoint quickstart --prompt "Give the animal's young, in brackets." --out special

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
    `pack` wrote; left out, the one shipped for SmolLM2-135M (`smollm2_tasks`). Also shipped: `smollm2_135m`,
    trained on the reasoning tasks, and `quickstart`, for the pocket pair."""
    cloud: str | None = None
    """Where the cloud model is, if not where it was when the generator was trained."""
    edge: str | None = None
    """Where the edge model is, if not where it was when the generator was trained."""


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
        print("no --checkpoint: the shipped generator for SmolLM2-135M is used", file=sys.stderr)

    from lora_gen_jax.adapters.specialization import save_specialization
    from lora_gen_jax.specializer import Specializer

    specializer = Specializer.load(flags.checkpoint, flags.cloud, flags.edge, edge_weights=False)
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
            f"give one of --prompt, --chat, --shots and --prompts (--prompt may describe --shots); found {found}",
            field="--prompt",
            code="count",
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
    from lora_gen_jax.adapters.specialization import save_specializations
    from lora_gen_jax.terminal import bar

    for prompt in prompts:
        try:
            specializer.ids(prompt.text)
        except DataError as error:
            raise error.within(f"{flags.prompts}: {prompt.name}") from error
    began = time.monotonic()
    with bar("specialising", len(prompts)) as progress:
        made = specializer.specialize([prompt.text for prompt in prompts], progress)
    save_specializations(((prompt.name, one) for prompt, one in zip(prompts, made, strict=True)), flags.out)
    seconds, size = time.monotonic() - began, sum(x.nbytes for one in made for x in one.tensors.values())
    what = "factors" if made[0].direct else "gates"
    print(
        f"{flags.out}: {len(made)} specialisations in {seconds:.1f} s, {len(made) / seconds:.1f} prompts/s,"
        f" {size} bytes of {what}",
        file=sys.stderr,
    )
