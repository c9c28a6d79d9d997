"""The command ``export``: a specialization in the formats of other programs.

In: flags. Out: a directory with a PEFT adapter, a Hugging Face model or an adapter of llama.cpp, and one line on
standard error. Heavy imports wait until the command runs, so that ``--help`` and mistakes answer at once.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from tyro.conf import arg

from lora_gen_jax.config import ModelConfig
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.export.formats import FORMATS, format_of

if TYPE_CHECKING:
    from lora_gen_jax.adapters.specialization import Specialization
    from lora_gen_jax.training.checkpoint import Loaded

    Name = str
else:
    Name = Literal[("merged", *FORMATS)]
_HELP = {
    "merged": "a whole model with the specialization in its weights, for anything that reads Hugging Face directories"
}
_HELP |= {name: what for name, (_, what) in FORMATS.items()}


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a specialization for other programs: a PEFT adapter, a merged Hugging Face model, or a GGUF adapter.

    None of them needs this package, the generator or the prompt any more. Example:

    lora-gen export --specialization special --format peft --out special-peft
    """

    format: Annotated[Name, arg(help=" ".join(f"{name}: {what}." for name, what in _HELP.items()))]
    out: Path
    """Directory to write; must not exist, or be empty."""
    specialization: Path | None = None
    """Directory that `specialize` wrote. May be left out with --base and --edge."""
    checkpoint: Path | None = None
    """Where the generator with the expert pool is, if not where it was when the specialization was made."""
    edge: str | None = None
    """Where the edge model is, if not where it was when the generator was trained."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the stored numbers; merged in float32 and rounded once."""
    max_shard_size_gb: float = 5.0
    """Largest file of a merged model's weights, in 10⁹ bytes."""
    base: bool = False
    """With --format merged: write the unspecialized edge model, what an adapter is applied to."""
    trust_recorded: bool = False
    """Open the generator's address that the specialization records in a bucket, too, with your own credentials."""


def export_command(flags: Export) -> None:
    """Checks what costs nothing first, reads weights only where they are written, and writes the directory.

    Raises:
        LoraGenError: for flags that do not fit together, an output that exists, another edge model or pool than the
            specialization's, or a family that the format lacks.
    """
    from lora_gen_jax.files import check_output

    check_output(flags.out)
    _check_flags(flags)
    made = None
    if flags.specialization is not None:
        from lora_gen_jax.specializer import read_specialization

        special, loaded, config = read_specialization(
            flags.specialization, flags.checkpoint, flags.edge, flags.trust_recorded
        )
        made = Made(special, loaded, config.edge)
    if flags.format == "merged":
        what, loads = _merged(flags, made)
    else:
        assert made is not None  # _check_flags
        what, loads = _adapter(flags, made)
    size = sum(path.stat().st_size for path in flags.out.rglob("*") if path.is_file())
    print(f"{flags.out}: {what}, {_size(size)}; load it with {loads}", file=sys.stderr)


class Made(NamedTuple):
    """A specialization, the generator that has its pool, and where its edge model is."""

    special: "Specialization"
    loaded: "Loaded"
    edge: ModelConfig


def _check_flags(flags: Export) -> None:
    if flags.base and flags.format != "merged":
        raise ConfigError(
            f"--base writes a whole model, not an adapter of format {flags.format}",
            field="--format",
            remedy="use --format merged",
        )
    if flags.specialization is None and not (flags.base and flags.edge):
        raise ConfigError(
            "--specialization is missing",
            field="--specialization",
            code="missing",
            remedy="name a directory that `lora-gen specialize` wrote (with --base, --edge alone will do)",
        )
    if not 0 < flags.max_shard_size_gb < float("inf"):
        raise ConfigError(
            f"--max-shard-size-gb is {flags.max_shard_size_gb}",
            field="--max-shard-size-gb",
            code="range",
            remedy="use a number above 0",
        )
    if flags.format != "merged" and flags.max_shard_size_gb != Export.max_shard_size_gb:
        raise ConfigError(
            f"--max-shard-size-gb is for --format merged; a {flags.format} adapter is one file",
            field="--max-shard-size-gb",
            code="conflict",
        )
    if flags.specialization is None and flags.checkpoint is not None:
        raise ConfigError(
            "--checkpoint is where a specialization's pool is",
            field="--checkpoint",
            remedy="name a --specialization, or leave it out",
        )


def _adapter(flags: Export, made: Made) -> tuple[str, str]:
    """Writes an adapter; returns what it is, and how it is loaded."""
    from lora_gen_jax.decoder.pretrained import load_config, resolve
    from lora_gen_jax.export.factors import ExportedAdapter, lora_factors, origin_of

    form, source = format_of(flags.format), made.edge.source
    config = load_config(resolve(source))
    form.check(config)
    factors = lora_factors(made.special, made.loaded.variables, made.loaded.config.generator, config.num_layers)
    adapter = ExportedAdapter(source, config, factors, origin_of(made.special, made.edge))
    _write(flags.out, lambda directory: form.write(adapter, directory, flags.dtype))
    return f"{form.title} of rank {adapter.rank}", form.load(flags.out)


def _merged(flags: Export, made: Made | None) -> tuple[str, str]:
    """Writes a whole model; returns what it is, and how it is loaded."""
    import jax
    import numpy as np

    from lora_gen_jax.adapters.merge import merge_donated
    from lora_gen_jax.adapters.specialization_fit import fitted_adapter
    from lora_gen_jax.export.factors import origin_of
    from lora_gen_jax.export.merged import MergedModel, write_merged
    from lora_gen_jax.models import load_model

    edge = ModelConfig(str(flags.edge)) if made is None else made.edge
    adapter, origin = None, None
    if made is not None and not flags.base:
        adapter = fitted_adapter(made.special, made.loaded.variables, made.loaded.config.generator)
        origin = origin_of(made.special, made.edge)
    # In the host's memory: a whole model in fp32 need not fit an accelerator.
    with jax.default_device(jax.devices("cpu")[0]):
        model = load_model(dataclasses.replace(edge, dtype="float32", weights="auto"))
        if adapter is not None:
            adapter = jax.device_put(adapter, jax.devices("cpu")[0])
            model = dataclasses.replace(model, params=merge_donated(model.params, adapter))
    merged, limit = MergedModel(model, edge.source, origin), int(flags.max_shard_size_gb * 1e9)
    _write(flags.out, lambda directory: write_merged(merged, directory, np.dtype(flags.dtype), limit))
    loads = f"transformers.AutoModelForCausalLM.from_pretrained({str(flags.out)!r})"
    return "base model" if flags.base else "merged model", loads


def _write(out: Path, fill: Callable[[Path], None]) -> None:
    from lora_gen_jax.files import complete_directory, writing

    with complete_directory(out) as directory, writing(out):
        fill(directory)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
