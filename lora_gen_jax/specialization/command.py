"""The command ``refine``: steps on examples, from a specialization that there is already.

In: flags. Out: a specialization directory. Heavy imports wait until the command runs, so that ``--help`` and mistakes
answer at once.
"""

import dataclasses
from pathlib import Path

from lora_gen_jax.specialization.settings import Kind


@dataclasses.dataclass(frozen=True)
class Refine:
    """Learns from solved examples, from a specialization on, and writes a better one.

    A few steps on the gates, or on a LoRA beside what was generated; expert pool and edge model stay as they are.
    Example:

    lora-gen refine --specialization special --examples more.jsonl --out better
    """

    specialization: Path
    """Directory that `specialize` or `refine` wrote."""
    examples: Path
    """A JSONL file with a solved example a line, {"input", "output"}."""
    out: Path
    """Directory to write; must not exist, or be empty."""
    refine: Kind | None = None
    """What learns: only the gates (the default), which keeps the specialization small; a LoRA beside what was
    generated; or both."""
    steps: int | None = None
    """At most so many; left out, as many as the generator's config says."""
    as_chat: bool = False
    """The examples stand in the edge model's chat template, as a server's chats and `generate --chat` have it."""
    checkpoint: Path | None = None
    """Where the generator with the expert pool is, if not where it was when the specialization was made."""
    trust_recorded: bool = False
    """Open the generator's address that the specialization records in a bucket or on the hub, too, with your own
    credentials."""
    cloud: str | None = None
    """Where the cloud model is, if not where it was when the generator was trained."""
    edge: str | None = None
    """Where the edge model is, if not where it was when the generator was trained."""


def refine_command(flags: Refine) -> None:
    """Checks what costs nothing first, then loads the models and refines."""
    from lora_gen_jax.commands import refined
    from lora_gen_jax.data.prompt_sources import read_examples
    from lora_gen_jax.files import check_output
    from lora_gen_jax.specialization.settings import RefineConfig

    check_output(flags.out)
    examples = read_examples(flags.examples)
    RefineConfig(steps=flags.steps)  # an impossible number is said before anything is loaded

    from lora_gen_jax.specializer import Specializer, read_specialization

    special, loaded, _ = read_specialization(flags.specialization, flags.checkpoint, flags.edge, flags.trust_recorded)
    specializer = Specializer.of(loaded, flags.cloud, flags.edge)
    config = specializer.refinement(flags.refine, flags.steps)
    refined(flags.out, lambda: specializer.refine(special, examples, config, flags.as_chat))
