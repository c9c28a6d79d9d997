"""The two frozen language models of an experiment, with their tokenizers and fingerprints.

In: a `Config`. Out: a `Pair`. Where cloud and edge are the same model, they share one copy of the weights.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_gen_jax.config import Config, ModelConfig
from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import (
    fingerprint,
    load_config,
    load_hf_config,
    load_params,
    load_tokenizer,
    resolve,
)
from lora_gen_jax.decoder.quantized import FORMATS, quantize_layers
from lora_gen_jax.errors import ConfigError, ModelError
from lora_gen_jax.generator.cloud import pack_prompts
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.processor import multiplies_bfloat16
from lora_gen_jax.sharding import param_shardings
from lora_gen_jax.untrusted import check_fields, check_tensors, flatten, read_object

if TYPE_CHECKING:
    from lora_gen_jax.training.checkpoint import Loaded

_END_IDS = int | list[int] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A frozen language model.

    Attributes:
        decoder: the module; its `config` has the sizes.
        params: its weights.
        encoder: its tokenizer.
        fingerprint: identifies the weights.
        weights: the format of its layers' matrices where they are quantized; else None.
    """

    decoder: Decoder
    params: Any
    encoder: Encoder
    fingerprint: str
    weights: str | None = None

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    @property
    def plain(self) -> EdgeModel:
        """The model as it is, to answer."""
        return EdgeModel(self.decoder, self.params)


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """The model that reads prompts and the model that is specialized."""

    cloud: Model
    edge: Model

    @property
    def frozen(self) -> dict[str, Any]:
        """Both weight trees."""
        return {"cloud": self.cloud.params, "edge": self.edge.params}

    def prompt_room(self, limit: int) -> int:
        """The longest prompt in cloud tokens: `limit`, or what the meta tokens leave of the cloud's positions."""
        return min(limit, self.cloud.config.max_positions - self.edge.config.num_layers)

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"cloud": self.cloud.fingerprint, "edge": self.edge.fingerprint}


def make_decoder(settings: ModelConfig, config: DecoderConfig, platform: str, training: bool = False) -> Decoder:
    """A model's module as a platform ("cpu", "gpu", "tpu") runs it.

    "auto" is bfloat16 on an accelerator. On a CPU it is float32, but for training mixed where the processor multiplies
    bfloat16 in hardware (`multiplies_bfloat16`). Its attention is the flash kernel on a TPU. What computes in float32
    does so in float64 under JAX_ENABLE_X64.

    Raises:
        ConfigError: for a kernel that the platform lacks.
    """
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(settings.attention, platform)
    if platform != needed:
        raise ConfigError(
            f"attention of {settings.source} is {settings.attention!r}, which needs a {needed.upper()}, and this is a"
            f" {platform.upper()}",
            field="attention",
            remedy="leave cloud.attention and edge.attention at auto",
        )
    name = settings.dtype
    if name == "auto":
        on_cpu = "mixed" if training and multiplies_bfloat16() else "float32"
        name = on_cpu if platform == "cpu" else "bfloat16"
    mixed = name == "mixed"
    full = jax.dtypes.canonicalize_dtype(float).type
    dtype: Any = full if name in ("float32", "mixed") else jnp.dtype(name).type
    kernel = "splash" if settings.attention == "auto" and platform == "tpu" else settings.attention
    return Decoder(config, dtype, settings.remat, settings.unroll, kernel, jnp.bfloat16 if mixed else None)


def precision_of(model: Model) -> str:
    """What `ModelConfig.dtype` calls the types that a model computes in, and its `ModelConfig.weights` if quantized."""
    decoder = model.decoder
    name = jnp.dtype(decoder.dtype).name if decoder.operands is None else "mixed"
    return name if model.weights is None else f"{name}, {model.weights} weights"


def quantization_of(settings: ModelConfig) -> str | None:
    """The format that a model's layers are quantized to; None for none."""
    return settings.weights if settings.weights in FORMATS else None


def share_weights(config: Config) -> bool:
    """Whether cloud and edge are the same weights, held once."""
    cloud, edge = config.cloud, config.edge
    return (cloud.source, cloud.dtype, cloud.weights) == (edge.source, edge.dtype, edge.weights)


def load_model(settings: ModelConfig, mesh: Mesh | None = None, weights: bool = True, training: bool = False) -> Model:
    """Reads a model's config, weights and tokenizer; without `weights` its `params` are None.

    `training` is as of `make_decoder`. Where products round their operands, the matrices are stored rounded, or
    quantized as `settings.weights` says.

    Raises:
        ModelError: as the functions of `lora_gen_jax.decoder.pretrained`.
    """
    source = resolve(settings.source)
    config = load_config(source)
    decoder = make_decoder(settings, config, jax.default_backend(), training)
    encoder = Encoder(load_tokenizer(source), config.vocab_size)
    if not weights:
        return Model(decoder, None, encoder, fingerprint(source))
    quantized = quantization_of(settings)
    shardings = None if mesh is None else param_shardings(mesh, lambda: init_params(decoder, weights=quantized))
    matrices = jnp.bfloat16 if settings.weights == "bfloat16" else decoder.operands
    params = load_params(source, config, decoder.dtype, shardings, matrices, quantized)
    return Model(decoder, params, encoder, fingerprint(source), weights=quantized)


def end_ids(source: str, model: Model) -> tuple[int, ...]:
    """The tokenizer's end token, and those that the model's own files name, as transformers has it.

    Raises:
        ModelError: when generation_config.json is damaged.
    """
    found = resolve(source)
    path = found.model / "generation_config.json"
    settings = read_object(path, ModelError, "download it again") if path.is_file() else {}
    check_fields(settings, {"eos_token_id": _END_IDS}, path.name, ModelError)
    named = settings.get("eos_token_id")
    if named is None and found.kind == "hf":
        named = load_hf_config(found).get("eos_token_id")
        check_fields({"eos_token_id": named}, {"eos_token_id": _END_IDS}, "config.json", ModelError)
    ids = named if isinstance(named, list) else [named]
    return tuple(sorted({i for i in (*ids, model.encoder.end) if i is not None}))


def init_params(decoder: Decoder, seed: int = 0, weights: str | None = None) -> Any:
    """Random parameters, boxed with their logical axes; `weights` is the format of the layers' matrices, if any."""
    params = decoder.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    return params if weights is None else quantize_layers(params, weights)


def load_pair(config: Config, mesh: Mesh | None = None, edge_weights: bool = True, training: bool = False) -> Pair:
    """Both models of an experiment; without `edge_weights` the edge's, unless they are the cloud's.

    `training` is as of `make_decoder`.

    Raises:
        ModelError: as `load_model`.
    """
    if share_weights(config):
        edge = load_model(config.edge, mesh, training=training)
        decoder = make_decoder(config.cloud, edge.config, jax.default_backend(), training)
        return Pair(dataclasses.replace(edge, decoder=decoder), edge)
    cloud = load_model(config.cloud, mesh, training=training)
    return Pair(cloud, load_model(config.edge, mesh, edge_weights, training))


def check_variables(loaded: "Loaded", module: Any, pair: Pair, reads: bool = True) -> None:
    """A checkpoint's variables must be those that its module has beside these models.

    Args:
        loaded: the checkpoint.
        module: as `make_generator` makes it for the checkpoint's config.
        pair: of models.
        reads: the module is called with prompts.

    Raises:
        CheckpointError: naming the tensor that is missing, too much or of another shape.
    """
    layers = pair.edge.config.num_layers
    prompts = pack_prompts([[0]], layers, 1, layers + 1) if reads else None
    frozen = pair.frozen[module.reader] if reads and module.reader else None
    keys = {name: jax.random.key(0) for name in ("params", "dropout", "gumbel")}
    wanted = jax.eval_shape(module.init, keys, frozen, prompts)
    shapes = {name: x.shape for name, x in flatten({kind: wanted.get(kind, {}) for kind in ("params", "batch_stats")})}
    # A portable generator has its scalars as vectors of one.
    found = {
        name: x.reshape(()) if (shapes.get(name), x.shape) == ((), (1,)) else x for name, x in flatten(loaded.variables)
    }
    check_tensors(found, shapes, str(loaded.path))
