"""What ``--model_args`` may say, and the model that it means.

In: lm-eval's arguments of the model `lora_gen`. Out: a `Subject`: the edge model, specialised or as it is, with an
identity by which results are kept and a description for results.json.
"""

import dataclasses
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax.adapters.merge import merge_donated
from lora_gen_jax.adapters.specialization import adapter_of, load_specialization
from lora_gen_jax.commands import find_generator, relocate
from lora_gen_jax.config import Config, EvalConfig, ModelConfig
from lora_gen_jax.decoder.pretrained import load_hf_config, resolve
from lora_gen_jax.errors import ConfigError, ModelError
from lora_gen_jax.evaluation.systems import multi_task
from lora_gen_jax.files import text_argument
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.models import Model, load_model, load_pair, make_generator
from lora_gen_jax.training.checkpoint import check_models, load_checkpoint, versions
from lora_gen_jax.training.portable import DEFAULT

# Tokens per sequence that lm-eval's batch size, a number of sequences, is translated with.
TOKENS_PER_SEQUENCE = 512


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the model is told, by ``--model_args`` and lm-eval's own flags.

    Attributes:
        model: the edge model: a directory, a ``.gguf`` file, a known name or a hub id. With a generator it may be left
            out, if the model is where it was when the generator was trained.
        dtype: of the edge model: auto, float32 or bfloat16; that of the generator's config when left out.
        checkpoint: a generator: a run's work directory, one step of it, or what `lora-gen pack` wrote.
        prompt: the text that the edge model is specialised for, or @FILE; without a checkpoint, by the generator that
            is shipped with the package.
        cloud: where the cloud model is, if not where it was when the generator was trained.
        specialization: a directory that `lora-gen specialize` wrote, instead of a prompt.
        batch_tokens: about how many tokens are read at a time; as batch_size says when left out.
        batch_size: "auto", or a number of sequences, taken as 512 tokens each.
        cache: a directory where finished requests are kept, so that a stopped evaluation goes on where it was.
        max_length: of context and continuation, at most; the model's positions when left out.
        seed: of draws, for tasks that sample.
        device, max_batch_size: lm-eval passes them; of no effect. JAX chooses the device (JAX_PLATFORMS).
    """

    model: str | None = None
    dtype: str | None = None
    checkpoint: str | None = None
    prompt: str | None = None
    cloud: str | None = None
    specialization: str | None = None
    batch_tokens: int | None = None
    batch_size: int | str = "auto"
    cache: str | None = None
    max_length: int | None = None
    seed: int = 0
    device: str | None = None
    max_batch_size: int | None = None

    @property
    def tokens_at_once(self) -> int:
        """`batch_tokens`, whichever argument it comes from."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        if str(self.batch_size).startswith("auto"):
            return EvalConfig().batch_tokens
        return int(self.batch_size) * TOKENS_PER_SEQUENCE


def parse_settings(arguments: dict[str, Any]) -> Settings:
    """Checks lm-eval's arguments.

    Raises:
        ConfigError: for an unknown argument, a value that cannot work, or two that exclude each other.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ConfigError(f"model argument {name!r} is unknown; {hint}")
    for name in ("batch_tokens", "max_length"):
        if name in given and (not isinstance(given[name], int) or given[name] < 1):
            raise ConfigError(f"{name}={given[name]} must be a whole number above 0")
    size = str(given.get("batch_size", "auto"))
    if not size.startswith("auto") and not (size.isdecimal() and int(size) > 0):
        raise ConfigError(f"batch_size={size} must be auto or a whole number above 0")
    if given.get("dtype", "auto") not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype={given['dtype']} must be auto, float32 or bfloat16")
    # lm-eval turns what looks like a number into one.
    texts = ("model", "checkpoint", "prompt", "cloud", "specialization", "cache")
    values: dict[str, Any] = {name: str(value) if name in texts else value for name, value in given.items()}
    settings = Settings(**values)
    if settings.specialization and settings.prompt:
        raise ConfigError("specialization holds a prompt's gates already: leave prompt out")
    if not (settings.model or settings.checkpoint or settings.prompt or settings.specialization):
        raise ConfigError(
            "there is no model: give --model_args model=DIR, and checkpoint= and prompt= to specialise it"
        )
    return settings


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """The model that is evaluated.

    Attributes:
        model: with the weights that answer, whatever is merged into them.
        end_ids: ids that end a generated text.
        identity: 16 hex digits of everything that its answers depend on.
        info: what results.json says about it.
    """

    model: Model
    end_ids: tuple[int, ...]
    identity: str
    info: dict[str, Any]


def load_subject(settings: Settings) -> Subject:
    """Loads the edge model, specialised where a prompt or a specialisation is given.

    Raises:
        ConfigError: for a generator without a prompt.
        CheckpointError, DataError, ModelError: as the functions that load, specialise and merge.
    """
    if settings.specialization:
        edge, config, made = _with_specialization(settings)
    elif settings.checkpoint or settings.prompt:
        edge, config, made = _with_generator(settings)
    else:
        config = ModelConfig(settings.model or "", dtype=settings.dtype or "auto")  # pyright: ignore
        edge, made = load_model(config), {"method": "base"}
    made |= {"edge": edge.fingerprint, "dtype": jnp.dtype(edge.decoder.dtype).name}
    ends = end_ids(config.source, edge)
    # Another version may tokenise, generate or merge otherwise.
    known = made | {"ends": sorted(ends), "versions": versions(), "tokenizer": _digest(repr(edge.encoder.tokenizer))}
    identity = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return Subject(edge, ends, identity, {"lora_gen": made, "versions": versions()})


def _with_specialization(settings: Settings) -> tuple[Model, ModelConfig, dict[str, Any]]:
    directory = Path(settings.specialization or "")
    special = load_specialization(directory)
    loaded = find_generator(special, None if settings.checkpoint is None else Path(settings.checkpoint))
    config = _relocated(loaded.config, settings)
    adapter = adapter_of(special, loaded.variables, config.generator)
    edge = load_model(config.edge)
    check_models(
        special.fingerprints, {**special.fingerprints, "edge": edge.fingerprint}, f"specialisation {directory}"
    )
    made = {"method": "specialization", **special.fingerprints, "gates": _content(special.tensors)}
    made["prompt"] = _digest(special.prompt)
    return _merged(edge, adapter), config.edge, made


def _with_generator(settings: Settings) -> tuple[Model, ModelConfig, dict[str, Any]]:
    loaded = load_checkpoint(Path(settings.checkpoint) if settings.checkpoint else DEFAULT)
    config = _relocated(loaded.config, settings)
    if (settings.prompt is None) != (config.method == "lora"):
        remedy = "leave prompt out" if settings.prompt else "give prompt=TEXT or prompt=@FILE"
        raise ConfigError(f"checkpoint {loaded.path} was trained with method {config.method}: {remedy}")
    prompt = text_argument(settings.prompt, "prompt") if settings.prompt is not None else ""
    pair = load_pair(config)
    check_models(loaded.fingerprints, pair.fingerprints, f"checkpoint {loaded.path}")
    made = {"method": config.method, "generator": _content(loaded.variables)}
    made["settings"] = _digest(json.dumps(dataclasses.asdict(config.generator), sort_keys=True))
    if config.method == "lora":
        return dataclasses.replace(pair.edge, params=multi_task(pair, loaded)), config.edge, made
    made |= {"prompt": _digest(prompt), "cloud": pair.cloud.fingerprint}
    made["cloud_dtype"] = jnp.dtype(pair.cloud.decoder.dtype).name
    ids = pair.cloud.encoder.prompt(prompt)
    generator, limit = make_generator(config, pair), config.eval.prompt_limit
    generated = specialize(generator, loaded.variables, pair.cloud.params, [ids], limit)
    return _merged(pair.edge, generated.adapter.select(0)), config.edge, made


def _relocated(config: Config, settings: Settings) -> Config:
    config = relocate(config, settings.cloud, settings.model)
    if settings.dtype is None:
        return config
    return dataclasses.replace(config, edge=dataclasses.replace(config.edge, dtype=settings.dtype))  # pyright: ignore


def _merged(edge: Model, adapter: Any) -> Model:
    # The base is not needed any more; where the cloud model shares its weights, neither is that.
    return dataclasses.replace(edge, params=merge_donated(edge.params, adapter))


def end_ids(source: str, model: Model) -> tuple[int, ...]:
    """The tokenizer's end token, and those that the model's own files name, as transformers has it.

    Raises:
        ModelError: when generation_config.json is damaged.
    """
    found = resolve(source)
    path = found.model / "generation_config.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); download it again") from error
    if named is None and found.kind == "hf":
        named = load_hf_config(found).get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    return tuple(sorted({i for i in (*ids, model.encoder.end) if i is not None}))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(tree: Any) -> str:
    """16 hex digits of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(tree), key=lambda item: str(item[0])):
        value = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{value.shape}{value.dtype}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()[:16]
