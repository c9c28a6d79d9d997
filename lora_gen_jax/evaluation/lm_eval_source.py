"""What ``--model_args`` may say, and the model that it means.

In: lm-eval's arguments of the model `lora_gen`. Out: a `EvaluatedModel`: the edge model, specialized or as it is.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from lora_gen_jax.adapters.merge import merge_donated
from lora_gen_jax.adapters.specialization_fit import fitted_adapter
from lora_gen_jax.config import Config, EvalConfig, ModelConfig
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.subject import EvaluatedModel, content_of, digest_of, identity_of
from lora_gen_jax.evaluation.systems import description_of, identifier
from lora_gen_jax.files import text_argument
from lora_gen_jax.methods.method import Prompt
from lora_gen_jax.methods.registry import BASE, trained_method
from lora_gen_jax.models import Model, Pair, end_ids, load_model, load_pair, precision_of
from lora_gen_jax.sharding import evaluation_mesh
from lora_gen_jax.specializer import read_specialization, relocate
from lora_gen_jax.training.checkpoint import Loaded, check_models, load_checkpoint, versions
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
        prompt: the text that the edge model is specialized for, or @FILE; without a checkpoint, by the generator that
            is shipped with the package.
        prompt_from_task: specialize the edge model for every task by what its contexts begin with, description and
            shots, instead of reading that with every document. All documents need the same shots.
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
    prompt_from_task: bool = False
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

    Raises ConfigError for an unknown argument, a value that cannot work, or two that exclude each other.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ConfigError(f"model argument {name!r} is unknown", field=name, code="unknown", remedy=hint)
    for name in ("batch_tokens", "max_length"):
        if name in given and (not isinstance(given[name], int) or given[name] < 1):
            raise ConfigError(f"{name}={given[name]} must be a whole number above 0", field=name)
    size = str(given.get("batch_size", "auto"))
    if not size.startswith("auto") and not (size.isdecimal() and int(size) > 0):
        raise ConfigError(f"batch_size={size} must be auto or a whole number above 0", field="batch_size")
    if given.get("dtype", "auto") not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype={given['dtype']} must be auto, float32 or bfloat16", field="dtype")
    # lm-eval turns what looks like a number into one.
    texts = ("model", "checkpoint", "prompt", "cloud", "specialization", "cache")
    values: dict[str, Any] = {name: str(value) if name in texts else value for name, value in given.items()}
    settings = Settings(**values)
    if not isinstance(settings.prompt_from_task, bool):
        problem = f"prompt_from_task={settings.prompt_from_task} must be true or false"
        raise ConfigError(problem, field="prompt_from_task", code="type")
    sources = ("specialization", "prompt", "prompt_from_task")
    named = [name for name in sources if getattr(settings, name)]
    if len(named) > 1:
        problem = f"{named[0]} and {named[1]} both say what the model is specialized for"
        raise ConfigError(problem, field=named[1], code="conflict", remedy="leave one out")
    if not (settings.model or settings.checkpoint or named):
        remedy = "give --model_args model=DIR, and checkpoint= and prompt= to specialize it"
        raise ConfigError("there is no model", field="model", remedy=remedy)
    return settings


def load_subject(settings: Settings) -> EvaluatedModel:
    """Loads the edge model, specialized where a prompt or a specialization is given.

    Raises:
        ConfigError: for a generator without a prompt.
        CheckpointError, DataError, ModelError: as the functions that load, specialize and merge.
    """
    if settings.specialization:
        return _with_specialization(settings)
    if settings.checkpoint or settings.prompt or settings.prompt_from_task:
        return _with_generator(settings)
    config = ModelConfig(settings.model or "", dtype=settings.dtype or "auto")  # pyright: ignore
    edge, made = load_model(config, evaluation_mesh()), {"method": BASE.key}
    return EvaluatedModel(identity_of(edge, made), edge, None, end_ids(config.source, edge), _info(edge, made))


def _info(edge: Model, made: dict[str, Any]) -> dict[str, Any]:
    dtype = precision_of(edge)
    return {"lora_gen": {**made, "edge": edge.fingerprint, "dtype": dtype}, "versions": versions()}


def _with_specialization(settings: Settings) -> EvaluatedModel:
    directory = Path(settings.specialization or "")
    checkpoint = None if settings.checkpoint is None else Path(settings.checkpoint)
    special, loaded, _ = read_specialization(directory, checkpoint, settings.model)
    config = _relocated(loaded.config, settings)
    edge = load_model(config.edge, evaluation_mesh(config.mesh.fsdp))
    adapter = fitted_adapter(special, loaded.variables, config.generator)
    made = {"method": "specialization", **special.fingerprints, "gates": content_of(special.tensors)}
    made["prompt"] = digest_of(special.prompt)
    answering = edge.plain.replace(adapter=adapter)
    if edge.weights is None:
        # The base is not needed any more.
        answering = edge.plain.replace(params=merge_donated(edge.params, adapter))
    ends = end_ids(config.edge.source, edge)
    return EvaluatedModel(identity_of(edge, made), edge, lambda: answering, ends, _info(edge, made))


def _with_generator(settings: Settings) -> EvaluatedModel:
    loaded = load_checkpoint(Path(settings.checkpoint) if settings.checkpoint else DEFAULT)
    config = _relocated(loaded.config, settings)
    prompted = settings.prompt is not None or settings.prompt_from_task
    method = trained_method(config.method)
    if method.needs_shots:
        problem = f"checkpoint {loaded.path} was trained with method {config.method}, which needs a task's shots apart"
        raise ConfigError(problem, field="checkpoint", code="method", remedy="score it with eval.py")
    if prompted != method.depends_on_prompt:
        remedy = "leave the prompt out" if prompted else "give prompt=TEXT, prompt=@FILE or prompt_from_task=true"
        problem = f"checkpoint {loaded.path} was trained with method {config.method}"
        raise ConfigError(problem, field="prompt", code="method", remedy=remedy)
    text = text_argument(settings.prompt, "prompt") if settings.prompt is not None else None
    pair = load_pair(config, evaluation_mesh(config.mesh.fsdp))
    check_models(loaded.fingerprints, pair.fingerprints, f"checkpoint {loaded.path}")
    made = with_method(config, pair, loaded)
    return made if text is None or made.specialize is None else made.specialize(text)


def with_method(config: Config, pair: Pair, loaded: Loaded) -> EvaluatedModel:
    """The edge model with what a trained method adds; where that depends on the prompt, by `specialize`.

    Args:
        config: whose settings of the evaluation the method uses.
        pair, loaded: the models, and the checkpoint of the method.
    """
    method, edge = trained_method(loaded.config.method), pair.edge
    made, ends = description_of(config, pair, loaded), end_ids(config.edge.source, edge)
    identify, make = identifier(config, pair, loaded), method.specialize(config, pair, loaded)
    if not method.depends_on_prompt:
        return EvaluatedModel(identify(None), edge, lambda: make(None), ends, _info(edge, made))

    def specialize(text: str) -> EvaluatedModel:
        prompt, soft = Prompt(text, (), False), method.soft_tokens(loaded.config)
        info = _info(edge, made | {"prompt": digest_of(text)})
        return EvaluatedModel(identify(prompt), edge, lambda: make(prompt), ends, info, soft_tokens=soft)

    return EvaluatedModel(identify(None), edge, None, ends, _info(edge, made), specialize)


def _relocated(config: Config, settings: Settings) -> Config:
    config = relocate(config, settings.cloud, settings.model)
    if settings.dtype is None:
        return config
    return dataclasses.replace(config, edge=dataclasses.replace(config.edge, dtype=settings.dtype))  # pyright: ignore
