"""The command ``pack``: its flags, and what it does.

In: flags. Out: a generator that travels, in a directory or on the Hugging Face hub. Heavy imports wait until the
command runs.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Literal

from lora_gen_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Pack:
    """Writes a trained generator as two small files that travel: without optimizer state, and in half precision.

    With --publish they go to the Hugging Face hub, with a model card. Examples:

    lora-gen pack --checkpoint runs/quickstart --out generator

    lora-gen pack --checkpoint runs/quickstart --publish ORG/NAME --license apache-2.0
    """

    checkpoint: Path
    """A run's work directory (its newest checkpoint is taken), one checkpoints/<step> directory, or a packed
    generator."""
    out: Path | None = None
    """Directory to write; must not exist, or be empty. May be left out with --publish."""
    publish: str | None = None
    """Repository on the Hugging Face hub, ORG/NAME: made where there is none, else it gets a new commit. The token is
    that of `hf auth login`, or HF_TOKEN."""
    private: bool = False
    """With --publish: make the repository private, if it is made."""
    license: str | None = None
    """With --publish: the generator's license, as the hub names licenses (apache-2.0, cc-by-sa-4.0, …); left out, the
    card says unknown."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the stored parameters."""

    def __post_init__(self) -> None:
        if self.out is None and self.publish is None:
            remedy = "give --out DIR, --publish ORG/NAME, or both"
            raise ConfigError("pack has nowhere to write", field="--out", remedy=remedy)
        for name in ("private", "license"):
            if self.publish is None and getattr(self, name):
                remedy = "give --publish ORG/NAME, or leave it out"
                raise ConfigError(f"--{name} is about publishing", field=f"--{name}", remedy=remedy)


def pack_command(flags: Pack) -> None:
    """Reads the checkpoint, writes the directory, and publishes it if that is asked for."""
    from lora_gen_jax.files import check_output
    from lora_gen_jax.training.published import check_publishing

    if flags.out is not None:
        check_output(flags.out)
    if flags.publish is not None:
        check_publishing(flags.publish)
    with tempfile.TemporaryDirectory() as temporary:
        _pack(flags, flags.out or Path(temporary) / "generator")


def _pack(flags: Pack, out: Path) -> None:
    import ml_dtypes
    import numpy as np

    from lora_gen_jax.files import write_text
    from lora_gen_jax.training.checkpoint import load_checkpoint
    from lora_gen_jax.training.portable import save_portable
    from lora_gen_jax.training.published import CARD, model_card, publish_generator

    loaded = load_checkpoint(flags.checkpoint)
    save_portable(loaded, out, ml_dtypes.bfloat16 if flags.dtype == "bfloat16" else np.float32)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{flags.out or flags.checkpoint}: {size / 1e3:.0f} KB", file=sys.stderr)
    if flags.publish is None:
        return
    if flags.license is None:
        print("no --license: the model card says that it is unknown", file=sys.stderr)
    write_text(out / CARD, model_card(out, flags.publish, loaded, flags.license or "unknown"))
    print(publish_generator(out, flags.publish, flags.private))
