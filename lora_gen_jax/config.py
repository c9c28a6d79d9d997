"""What an experiment is: frozen dataclasses, their cross-field checks, and how a config file becomes one.

In: a Python file with ``get_config()`` and command-line flags that override any field
(``--train.steps 10``). Out: a checked `Config`. Paper values are the defaults (its Table 10).
"""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lora_gen_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A frozen language model.

    Attributes:
        source: a known name (smollm2-135m), a Hugging Face directory, a .gguf file or a hub id.
        dtype: of weights and activations; "auto" is bfloat16 on an accelerator and float32 on a CPU.
        remat: what the backward pass keeps of each layer: none (everything), dots (matmul results), full (nothing).
        unroll: layers per iteration of the scan over layers; must divide nothing, larger compiles longer.
    """

    source: str = "smollm2-135m"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: int = 1


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """The trainable part: cloud LoRA, meta tokens, router and expert pool.

    Attributes:
        generator: meta_tokens (gates over a pool), or direct: the cloud emits the LoRA factors themselves.
        routing: keep_top_k, or gumbel (soft mixture of all experts).
        pool: one pool shared by all edge layers, or one per layer.
        mix: products sums G·A·B over the experts; factors multiplies the sums of G·A and of G·B.
        num_experts: E.
        top_k: K experts a layer uses; ignored by gumbel routing.
        rank: R of every expert.
        alpha: LoRA's α; the product is scaled by alpha / rank.
        dropout: on the LoRA inputs, cloud and edge.
        cv_coefficient: weight of the balance loss CV².
        router_width: hidden width of the router; left out, the cloud model's width.
        batch_norm: BatchNorm over the router's logits; off only for ablation.
        shared_meta_token: one meta embedding for all layers instead of one each.
        cloud_rank: rank of the LoRA on the cloud model's q and v; 0 leaves the cloud model as it is.
        cloud_alpha: α of that LoRA.
        direct_width: hidden width of the head of direct generation.
        gumbel_temperature: of gumbel routing.
    """

    generator: Literal["meta_tokens", "direct"] = "meta_tokens"
    routing: Literal["keep_top_k", "gumbel"] = "keep_top_k"
    pool: Literal["shared", "per_layer"] = "shared"
    mix: Literal["products", "factors"] = "products"
    num_experts: int = 8
    top_k: int = 2
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.05
    cv_coefficient: float = 0.01
    router_width: int | None = None
    batch_norm: bool = True
    shared_meta_token: bool = False
    cloud_rank: int = 16
    cloud_alpha: float = 16.0
    direct_width: int = 128
    gumbel_temperature: float = 1.0

    @property
    def active_experts(self) -> int:
        """Gates of a row that may differ from zero."""
        return self.num_experts if self.routing == "gumbel" else self.top_k


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Tasks and the shape of a batch: P prompts, each read once by the cloud and answered for by several queries.

    Attributes:
        dir: directory with the tasks' original files, one subdirectory a task; left out, tensorflow-datasets.
        tfds_dir: where tensorflow-datasets keeps its prepared data; left out, its own default.
        files: your own JSONL files, or directories of them, trained on beside the named tasks.
        tasks: names of the reasoning tasks to train on.
        source_weights: chance of a task source relative to the others, as name=weight; unnamed sources weigh 1.
        prompts_per_step: P, over all processes.
        prompts_per_row: prompts packed into one row of the cloud's batch; divides P.
        cloud_length: tokens of a cloud row, meta tokens included.
        edge_length: tokens of an edge row: the queries and answers of one prompt, packed.
        queries_per_prompt: at most this many queries share a prompt.
        response_slots: answer tokens of an edge row that are learned from.
        min_shots, max_shots: shots in a training prompt, drawn evenly, both included.
        query_length: longest query with its answer; longer ones are left out of training.
    """

    dir: Path | None = None
    tfds_dir: Path | None = None
    files: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ("arc_challenge", "arc_easy", "openbookqa", "boolq", "social_iqa")
    source_weights: tuple[str, ...] = ()
    prompts_per_step: int = 64
    prompts_per_row: int = 1
    cloud_length: int = 2048
    edge_length: int = 2048
    queries_per_prompt: int = 8
    response_slots: int = 256
    min_shots: int = 1
    max_shots: int = 5
    query_length: int = 1024


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation, and what a run writes when.

    Attributes:
        steps: optimiser steps.
        learning_rate: peak of warm-up and cosine decay to zero.
        warmup_steps: linear from zero.
        beta1, beta2, weight_decay: AdamW's; decay spares norms, embeddings and BatchNorm.
        clip_norm: clip the gradient to this global norm; left out, no clipping.
        seed: of parameters, dropout and data order.
        validation_batches: fixed batches of held-out queries whose loss is logged; 0 logs none.
        validate_every, checkpoint_every: in steps.
        keep_checkpoints: newest checkpoints that are kept, beside the best.
        profile: write a profiler trace of steps 5 to 8 to the work directory.
    """

    steps: int = 1000
    learning_rate: float = 2e-5
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.1
    clip_norm: float | None = None
    seed: int = 0
    validation_batches: int = 2
    validate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    profile: bool = False


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Scoring.

    Attributes:
        tasks: what eval.py scores; left out, all eight reasoning tasks.
        methods: base, icl, lora_gen.
        shots: shots in the system prompt: read by the cloud, and by the edge for icl.
        limit: documents a task, the first ones; left out, all.
        seed: of the choice of shots.
        batch_tokens: tokens of one scoring batch.
        prompt_limit: longest system prompt, in cloud tokens; a longer one is an error.
    """

    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("base", "icl", "lora_gen")
    shots: int = 5
    limit: int | None = None
    seed: int = 0
    batch_tokens: int = 8192
    prompt_limit: int = 2048


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment.

    Attributes:
        name: of the run's directory; the config file's name when left empty.
        method: which system is trained.
        cloud: reads the prompt.
        edge: is specialised.
        workdir: everything a run writes; left out, runs/<name>.
    """

    name: str = ""
    method: Literal["lora_gen"] = "lora_gen"
    cloud: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    edge: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    generator: GeneratorConfig = dataclasses.field(default_factory=GeneratorConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    workdir: Path | None = None

    @property
    def directory(self) -> Path:
        """Everything the run writes."""
        return self.workdir if self.workdir is not None else Path("runs") / self.name


def check(config: Config) -> Config:
    """The config itself, when its fields fit together.

    Raises:
        ConfigError: naming the field and the remedy.
    """
    g, d, t = config.generator, config.data, config.train
    positive = {
        "generator.num_experts": g.num_experts,
        "generator.top_k": g.top_k,
        "generator.rank": g.rank,
        "generator.direct_width": g.direct_width,
        "generator.router_width": 1 if g.router_width is None else g.router_width,
        "data.prompts_per_step": d.prompts_per_step,
        "data.prompts_per_row": d.prompts_per_row,
        "data.cloud_length": d.cloud_length,
        "data.edge_length": d.edge_length,
        "data.queries_per_prompt": d.queries_per_prompt,
        "data.response_slots": d.response_slots,
        "data.query_length": d.query_length,
        "train.steps": t.steps,
        "train.validate_every": t.validate_every,
        "train.checkpoint_every": t.checkpoint_every,
        "train.keep_checkpoints": t.keep_checkpoints,
        "cloud.unroll": config.cloud.unroll,
        "edge.unroll": config.edge.unroll,
        "eval.batch_tokens": config.eval.batch_tokens,
        "eval.prompt_limit": config.eval.prompt_limit,
    }
    for field, value in positive.items():
        if value < 1:
            raise ConfigError(f"{field} is {value}; it must be at least 1")
    rules = [
        (g.top_k <= g.num_experts, f"generator.top_k is {g.top_k}; at most generator.num_experts = {g.num_experts}"),
        (0 <= g.dropout < 1, f"generator.dropout is {g.dropout}; it must lie in [0, 1)"),
        (g.cloud_rank >= 0, f"generator.cloud_rank is {g.cloud_rank}; it must be 0 or more"),
        (g.cv_coefficient >= 0, f"generator.cv_coefficient is {g.cv_coefficient}; it must be 0 or more"),
        (
            g.gumbel_temperature > 0,
            f"generator.gumbel_temperature is {g.gumbel_temperature}; it must be positive",
        ),
        (
            d.prompts_per_step % d.prompts_per_row == 0,
            f"data.prompts_per_row = {d.prompts_per_row} must divide data.prompts_per_step = {d.prompts_per_step}",
        ),
        (
            0 <= d.min_shots <= d.max_shots,
            f"data.min_shots = {d.min_shots} must lie between 0 and data.max_shots = {d.max_shots}",
        ),
        (
            d.query_length <= d.edge_length,
            f"data.query_length = {d.query_length} is more than data.edge_length = {d.edge_length} holds",
        ),
        (t.learning_rate > 0, f"train.learning_rate is {t.learning_rate}; it must be positive"),
        (0 <= t.beta1 < 1, f"train.beta1 is {t.beta1}; it must lie in [0, 1)"),
        (0 <= t.beta2 < 1, f"train.beta2 is {t.beta2}; it must lie in [0, 1)"),
        (t.weight_decay >= 0, f"train.weight_decay is {t.weight_decay}; it must be 0 or more"),
        (t.validation_batches >= 0, f"train.validation_batches is {t.validation_batches}; it must be 0 or more"),
        (0 <= t.warmup_steps < t.steps, f"train.warmup_steps = {t.warmup_steps} must be below train.steps = {t.steps}"),
        (t.clip_norm is None or t.clip_norm > 0, f"train.clip_norm is {t.clip_norm}; it must be positive or left out"),
        (config.eval.shots >= 0, f"eval.shots is {config.eval.shots}; it must be 0 or more"),
        (config.eval.limit is None or config.eval.limit > 0, f"eval.limit is {config.eval.limit}; at least 1"),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)
    return config


def read_config(path: Path) -> Config:
    """Runs a config file's ``get_config()``; the file's name becomes the config's where it gives none.

    Raises:
        ConfigError: when the file is missing, fails, or has no ``get_config()`` that returns a `Config`.
    """
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"lora_gen_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {path} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config() if callable(get_config) else None
    except Exception as error:
        raise ConfigError(f"config file {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"config file {path} needs a function get_config() that returns a lora_gen_jax.config.Config")
    return config if config.name else dataclasses.replace(config, name=path.stem)


def config_from_args(program: str, args: Sequence[str]) -> Config:
    """``CONFIG.py [--any.field VALUE …]`` as a checked `Config`; flags override the file's values.

    A misspelt flag prints the nearest ones and exits with status 2; ``--help`` lists all with their defaults.

    Raises:
        ConfigError: as `read_config` and `check`.
    """
    import tyro

    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print(f"usage: {program} CONFIG.py [--any.field VALUE …]\n\n{program} CONFIG.py --help lists the fields.")
            sys.exit(0)
        raise ConfigError(f"name a config file first: {program} configs/smollm2_135m.py [--any.field VALUE …]")
    config = read_config(Path(args[0]))
    options = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return check(tyro.cli(Config, prog=f"{program} {args[0]}", args=list(args[1:]), default=config, config=options))


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(values: dict[str, Any]) -> Config:
    """A `Config` from `to_json`'s values; fields that a newer version added take their defaults.

    Raises:
        ConfigError: for a field that this version does not know.
    """
    nested = {"cloud": ModelConfig, "edge": ModelConfig, "generator": GeneratorConfig}
    nested |= {"data": DataConfig, "train": TrainConfig, "eval": EvalConfig}

    def build(cls: Any, fields: dict[str, Any], prefix: str) -> Any:
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ConfigError(f"saved config has the field {prefix}{name}, which this version does not know")
        return cls(**{name: _from_json_value(name, value) for name, value in fields.items()})

    top = {k: build(nested[k], v, f"{k}.") if k in nested else v for k, v in values.items()}
    return build(Config, top, "")


def _from_json_value(name: str, value: Any) -> Any:
    if name in ("dir", "tfds_dir", "workdir"):
        return None if value is None else Path(value)
    if name == "files":
        return tuple(Path(v) for v in value)
    return tuple(value) if isinstance(value, list) else value


# Where things lie may differ between two machines that continue the same run.
LOCATION_FIELDS = ("workdir", "data.dir", "data.tfds_dir")


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines 'field: old -> new' for two configs as `to_json` gives them, locations left out."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    fields = sorted((flat_old.keys() | flat_new.keys()) - set(LOCATION_FIELDS))
    return [f"{f}: {flat_old.get(f)!r} -> {flat_new.get(f)!r}" for f in fields if flat_old.get(f) != flat_new.get(f)]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
