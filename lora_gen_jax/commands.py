"""The commands ``specialize``, ``generate`` and ``pack``: their flags, and what they do.

In: flags. Out: a specialisation directory; an answer on standard output. Heavy imports wait until a command runs, so
that ``--help`` and mistakes answer at once.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from lora_gen_jax.config import Config, ModelConfig
from lora_gen_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Specialize:
    """Reads a task's system prompt once and writes a specialisation of the edge model.

    The prompt is a description, a few solved examples, a tool list, a role, or any mix of them. The result is a small
    directory that `generate` uses. Example:

    lora-gen specialize --prompt "Give the animal's young, in brackets." --out special
    """

    prompt: str
    """The system prompt, or @FILE to read it from a file."""
    out: Path
    """Directory to write; must not exist, or be empty."""
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
    """Checks what costs nothing first, then loads the cloud model and generates."""
    from lora_gen_jax.adapters.specialization import (
        Specialization,
        pool_fingerprint,
        save_specialization,
        sparse_tensors,
    )
    from lora_gen_jax.files import check_output, text_argument
    from lora_gen_jax.generator.specialize import specialize
    from lora_gen_jax.models import load_pair, make_generator
    from lora_gen_jax.training.checkpoint import check_models, load_checkpoint, versions
    from lora_gen_jax.training.portable import DEFAULT

    prompt = text_argument(flags.prompt, "--prompt")
    check_output(flags.out)
    if flags.checkpoint is None:
        print("no --checkpoint: the shipped generator for the pocket pair is used", file=sys.stderr)
    loaded = load_checkpoint(flags.checkpoint or DEFAULT)
    if loaded.config.method != "lora_gen":
        raise CheckpointError(
            f"{loaded.path} was trained with method {loaded.config.method}, which makes no gates of a prompt: give a"
            " checkpoint of method lora_gen"
        )
    config = relocate(loaded.config, flags.cloud, flags.edge)
    pair = load_pair(config)
    check_models(loaded.fingerprints, pair.fingerprints, f"checkpoint {loaded.path}")
    ids = pair.cloud.encoder.prompt(prompt)
    limit = config.eval.prompt_limit
    made = specialize(make_generator(config, pair), loaded.variables, pair.cloud.params, [ids], limit)
    result = Specialization(
        tensors=sparse_tensors(made, config.generator),
        fingerprints={**loaded.fingerprints, "pool": pool_fingerprint(loaded.variables)},
        prompt=prompt,
        checkpoint=None if flags.checkpoint is None else str(loaded.path.absolute()),
        versions=versions(),
    )
    save_specialization(result, flags.out)
    size = (flags.out / "specialization.safetensors").stat().st_size
    print(f"{flags.out}: {len(ids)} prompt tokens became {size} bytes", file=sys.stderr)


def generate_command(flags: Generate) -> None:
    """Merges the specialisation into the edge model and streams its answer."""
    from lora_gen_jax.adapters.merge import merge
    from lora_gen_jax.adapters.specialization import adapter_of, load_specialization
    from lora_gen_jax.files import text_argument
    from lora_gen_jax.inference.decode import stream
    from lora_gen_jax.inference.sampling import Sampling
    from lora_gen_jax.models import load_model
    from lora_gen_jax.training.checkpoint import check_models

    text = text_argument(flags.input, "--input")
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p).checked()
    specialization = load_specialization(flags.specialization)
    loaded = find_generator(specialization, flags.checkpoint)
    config = relocate(loaded.config, None, flags.edge)
    # A wrong pool is noticed before the model is read.
    adapter = adapter_of(specialization, loaded.variables, config.generator)
    edge = load_model(config.edge)
    found = {**specialization.fingerprints, "edge": edge.fingerprint}
    check_models(specialization.fingerprints, found, f"specialisation {flags.specialization}")
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


def find_generator(specialization: Any, named: Path | None) -> Any:
    """The checkpoint with a specialisation's pool: the one named, else the one recorded when it was made, else the
    shipped generator that has this pool.

    Raises:
        CheckpointError: when none of them is there.
    """
    from lora_gen_jax.adapters.specialization import pool_fingerprint
    from lora_gen_jax.training.checkpoint import load_checkpoint
    from lora_gen_jax.training.portable import SHIPPED

    recorded = specialization.checkpoint
    if named is not None:
        return load_checkpoint(named)
    if recorded is not None and Path(recorded).is_dir():
        return load_checkpoint(Path(recorded))
    for path in SHIPPED.values():
        loaded = load_checkpoint(path)
        if pool_fingerprint(loaded.variables) == specialization.fingerprints["pool"]:
            return loaded
    raise CheckpointError(
        f"the expert pool of this specialisation was not found: no --checkpoint was given, the checkpoint recorded when"
        f" it was made ({recorded}) is gone, and no shipped generator has that pool. Give --checkpoint DIR"
    )


def relocate(config: Config, cloud: str | None, edge: str | None) -> Config:
    """The config with its models read from elsewhere."""

    def at(model: ModelConfig, source: str | None) -> ModelConfig:
        return model if source is None else dataclasses.replace(model, source=source)

    return dataclasses.replace(config, cloud=at(config.cloud, cloud), edge=at(config.edge, edge))
