"""The two frozen language models of an experiment, with their tokenizers and fingerprints.

In: a `Config`. Out: a `Pair`. Where cloud and edge are the same model, they share one copy of the weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_gen_jax.config import Config, ModelConfig
from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import fingerprint, load_config, load_params, load_tokenizer, resolve
from lora_gen_jax.inference.prefix import Prefix
from lora_gen_jax.methods import trained_method
from lora_gen_jax.sharding import param_shardings


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A frozen language model.

    Attributes:
        decoder: the module; its `config` has the sizes.
        params: its weights.
        encoder: its tokenizer.
        fingerprint: identifies the weights.
        adapter: beside the weights, where a method cannot be merged; else None.
        soft: keys and values of soft tokens that stand before everything it reads; else None.
    """

    decoder: Decoder
    params: Any
    encoder: Encoder
    fingerprint: str
    adapter: Any = None
    soft: Prefix | None = None

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """The model that reads prompts and the model that is specialised."""

    cloud: Model
    edge: Model

    @property
    def frozen(self) -> dict[str, Any]:
        """Both weight trees."""
        return {"cloud": self.cloud.params, "edge": self.edge.params}

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"cloud": self.cloud.fingerprint, "edge": self.edge.fingerprint}


def make_decoder(settings: ModelConfig, config: DecoderConfig, platform: str) -> Decoder:
    """A model's module as a platform ("cpu", "gpu", "tpu") runs it.

    "auto" computes in float32 on a CPU, where XLA runs bfloat16 slower, and in bfloat16 elsewhere; its attention is the
    flash kernel on a TPU.
    """
    automatic: Any = jnp.float32 if platform == "cpu" else jnp.bfloat16
    dtype = automatic if settings.dtype == "auto" else jnp.dtype(settings.dtype).type
    kernel = "splash" if settings.attention == "auto" and platform == "tpu" else settings.attention
    return Decoder(config, dtype, settings.remat, settings.unroll, kernel)


def share_weights(config: Config) -> bool:
    """Whether cloud and edge are the same weights, held once."""
    return (config.cloud.source, config.cloud.dtype) == (config.edge.source, config.edge.dtype)


def load_model(settings: ModelConfig, mesh: Mesh | None = None) -> Model:
    """Reads a model's config, weights and tokenizer.

    Raises:
        ModelError: as the functions of `lora_gen_jax.decoder.pretrained`.
    """
    source = resolve(settings.source)
    config = load_config(source)
    decoder = make_decoder(settings, config, jax.default_backend())
    encoder = Encoder(load_tokenizer(source), config.vocab_size)
    shardings = None if mesh is None else param_shardings(mesh, lambda: init_params(decoder))
    return Model(decoder, load_params(source, config, decoder.dtype, shardings), encoder, fingerprint(source))


def init_params(decoder: Decoder, seed: int = 0) -> Any:
    """Random parameters, boxed with their logical axes."""
    return decoder.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


def load_pair(config: Config, mesh: Mesh | None = None) -> Pair:
    """Both models of an experiment.

    Raises:
        ModelError: as `load_model`.
    """
    edge = load_model(config.edge, mesh)
    if share_weights(config):
        decoder = make_decoder(config.cloud, edge.config, jax.default_backend())
        return Pair(dataclasses.replace(edge, decoder=decoder), edge)
    return Pair(load_model(config.cloud, mesh), edge)


def make_generator(config: Config, pair: Pair) -> Any:
    """The trainable module (`TrainedModule`) of the config's method.

    Raises:
        ConfigError: for a method that nothing is trained for.
    """
    build = trained_method(config.method).build
    assert build is not None
    return build(config, pair)
