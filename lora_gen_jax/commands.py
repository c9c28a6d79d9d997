"""The command ``specialize``: its flags, and what it does.

In: flags. Out: specialization directories. Heavy imports wait until a command runs, so that ``--help`` and mistakes
answer at once.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.specialization.settings import Kind

if TYPE_CHECKING:
    from lora_gen_jax.adapters.specialization import Specialization
    from lora_gen_jax.data.prompt_sources import NamedPrompt
    from lora_gen_jax.specialization.prompt import Prompt
    from lora_gen_jax.specialization.settings import RefineConfig
    from lora_gen_jax.specializer import Specializer


@dataclasses.dataclass(frozen=True)
class Specialize:
    """Reads a task's system prompt once and writes a specialization of the edge model.

    The prompt is a description, a few solved examples, a tool list, a role, or any mix of them; give one of --prompt,
    --chat, --shots, --examples and --prompts. The result is a small directory that `generate` uses. Examples:

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
    examples: Path | None = None
    """A JSONL file with a solved example a line, {"input", "output"}: read as shots behind the --prompt, if there is
    one, and then learned from."""
    refine: Kind | None = None
    """What learns from the --examples: only the gates (the default), which keeps the specialization small; a LoRA
    beside what was generated; or both."""
    steps: int | None = None
    """Steps on the --examples, at most; 0 only reads them. Left out, as many as the generator's config says."""
    as_chat: bool = False
    """The --examples stand in the edge model's chat template, as a server's chats and `generate --chat` have it."""
    prompts: Path | None = None
    """A JSONL file of many: each line has "prompt", "messages", "shots" or "examples" (these two with "description"),
    and may have a "name" (the line's number if not). All that have examples learn from them together."""
    checkpoint: Path | None = None
    """A run's work directory (its newest checkpoint is taken), one checkpoints/<step> directory, a generator that
    `pack` wrote, or the name of one: on the Hugging Face hub (ORG/NAME, or ORG/NAME@REVISION), or shipped
    (`smollm2_135m`, trained on the reasoning tasks; `quickstart`, for the pocket pair). Left out, the one shipped for
    SmolLM2-135M (`smollm2_tasks`)."""
    cloud: str | None = None
    """Where the cloud model is, if not where it was when the generator was trained."""
    edge: str | None = None
    """Where the edge model is, if not where it was when the generator was trained."""

    def __post_init__(self) -> None:
        sources = ("prompt", "chat", "shots", "examples", "prompts")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1 and given not in (["prompt", "shots"], ["prompt", "examples"]):
            found = " and ".join(f"--{name}" for name in given) or "none of them"
            raise ConfigError(
                "give one of --prompt, --chat, --shots, --examples and --prompts (--prompt may describe --shots or"
                f" --examples); found {found}",
                field="--prompt",
                code="count",
            )


def specialize_command(flags: Specialize) -> None:
    """Checks what costs nothing first, then loads the models and generates."""
    from lora_gen_jax.data.prompt_sources import read_prompts
    from lora_gen_jax.files import check_output

    many = None if flags.prompts is None else read_prompts(flags.prompts)
    prompts = [_single_prompt(flags)] if many is None else [_prompt_of(named, flags) for named in many]
    refining = _refines(flags, prompts)
    check_output(flags.out)
    if flags.checkpoint is None:
        print("no --checkpoint: the shipped generator for SmolLM2-135M is used", file=sys.stderr)

    from lora_gen_jax.adapters.specialization import save_specialization
    from lora_gen_jax.specializer import Specializer

    specializer = Specializer.load(flags.checkpoint, flags.cloud, flags.edge, edge_weights=refining)
    refinement = specializer.refinement(flags.refine, flags.steps) if refining else None
    if many is not None:
        names = [named.name for named in many]
        _specialize_many(specializer, dict(zip(names, prompts, strict=True)), refinement, flags)
        return
    if refining:
        refined(flags.out, lambda: specializer.specialize(prompts, refine=refinement)[0])
        return
    (made,) = specializer.specialize(prompts)
    save_specialization(made, flags.out)
    size = (flags.out / "specialization.safetensors").stat().st_size
    print(f"{flags.out}: {len(specializer.ids(made.prompt))} prompt tokens became {size} bytes", file=sys.stderr)


def _single_prompt(flags: Specialize) -> "str | Prompt":
    from lora_gen_jax.data.prompt_sources import read_chat, read_examples, read_shots
    from lora_gen_jax.files import text_argument

    text = "" if flags.prompt is None else text_argument(flags.prompt, "--prompt")
    if flags.chat is not None:
        return read_chat(flags.chat)
    if flags.examples is not None:
        from lora_gen_jax.specialization.prompt import Prompt

        return Prompt(text, read_examples(flags.examples), flags.as_chat)
    return text if flags.shots is None else read_shots(flags.shots, text)


def _prompt_of(named: "NamedPrompt", flags: Specialize) -> "str | Prompt":
    from lora_gen_jax.specialization.prompt import Prompt

    return Prompt(named.text, named.examples, flags.as_chat) if named.examples else named.text


def _refines(flags: Specialize, prompts: "Sequence[str | Prompt]") -> bool:
    """Whether there are examples to learn from, and --steps is not 0."""
    from lora_gen_jax.specialization.settings import RefineConfig

    RefineConfig(steps=flags.steps)
    if any(not isinstance(prompt, str) for prompt in prompts):
        return flags.steps != 0
    for name in ("refine", "steps", "as_chat"):
        if getattr(flags, name) not in (None, False):
            flag, remedy = f"--{name.replace('_', '-')}", "give --examples, or rows of --prompts that have some"
            raise ConfigError(f"{flag} is about examples, and there are none", field=flag, remedy=remedy)
    return False


def refined(out: Path, make: Callable[[], "Specialization"]) -> None:
    """Refines, writes the specialization, and says what came of it."""
    from lora_gen_jax.adapters.specialization import save_specialization

    began = time.monotonic()
    made = make()
    seconds, record = time.monotonic() - began, made.refined
    assert record is not None
    save_specialization(made, out)
    size = (out / "specialization.safetensors").stat().st_size
    learned = "gates and a lora" if record["kind"] == "both" else record["kind"]
    print(
        f"{out}: {record['examples']} examples, {record['steps']} steps on the {learned}, {seconds:.1f} s; loss"
        f" {record['loss_before']:.3f} before, {record['loss_after']:.3f} after (nats a token); {size} bytes",
        file=sys.stderr,
    )


def _specialize_many(
    specializer: "Specializer",
    prompts: "Mapping[str, str | Prompt]",
    refinement: "RefineConfig | None",
    flags: Specialize,
) -> None:
    """A specialization directory for every prompt, below --out; a bar on a terminal, and a last line."""
    from lora_gen_jax.adapters.specialization import save_specializations

    for name, prompt in prompts.items():
        try:
            specializer.ids(prompt if isinstance(prompt, str) else prompt.text(specializer.fits))
        except DataError as error:
            raise error.within(f"{flags.prompts}: {name}") from error
    began = time.monotonic()
    with bar("specializing", len(prompts)) as progress:
        made = specializer.specialize(list(prompts.values()), progress, refine=refinement)
    save_specializations(zip(prompts, made, strict=True), flags.out)
    seconds, size = time.monotonic() - began, sum(x.nbytes for one in made for x in one.tensors.values())
    what = "factors" if made[0].direct else "gates and factors" if any(one.factors for one in made) else "gates"
    learned = [one.refined for one in made if one.refined is not None]
    said = ""
    if learned:
        before, after = (sum(one[f"loss_{when}"] for one in learned) / len(learned) for when in ("before", "after"))
        said = (
            f"; {len(learned)} learned from examples, mean loss {before:.3f} before, {after:.3f} after (nats a token)"
        )
    print(
        f"{flags.out}: {len(made)} specializations in {seconds:.1f} s, {len(made) / seconds:.1f} prompts/s,"
        f" {size} bytes of {what}{said}",
        file=sys.stderr,
    )


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal while the block runs; call what it gives with the number done (and their total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done, _: progress.update(task, completed=done)
