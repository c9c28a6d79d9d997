"""The programs of an experiment, ready to be compiled for chips that are not there.

In: a `Config`, a mesh of such chips and `Sizes`. Out: `Program`s, whose weights, state and batch are shapes with
shardings: nothing is loaded and nothing is allocated.

``train_step`` and ``specialise`` lie on the config's mesh. ``prefill`` and ``decode`` run the specialized edge model as
evaluation and serving do: rows split over all chips, the weights whole on each of them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import Config, ModelConfig
from lora_gen_jax.data.pipeline import Batch, EdgeRows
from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import load_config, resolve
from lora_gen_jax.decoder.pretrained.shapes import KNOWN_SHAPES
from lora_gen_jax.decoder.quantized import quantize_layers
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.cloud import PackedPrompts
from lora_gen_jax.inference.edge_model import forward_only, logits_at
from lora_gen_jax.methods.registry import GENERATOR, make_generator
from lora_gen_jax.models import Model, Pair, init_params, make_decoder, quantization_of, share_weights
from lora_gen_jax.sharding import make_mesh, param_shardings, spec
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.prepare import check_rows
from lora_gen_jax.training.step import init_state, make_train_step

NAMES = ("train_step", "specialise", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What prefill and decode are compiled for.

    Attributes:
        rows: sequences a chip.
        tokens: read by prefill, a sequence.
        slots: of the cache that decode reads, all of them filled.
    """

    rows: int = 8
    tokens: int = 512
    slots: int = 1024


@dataclasses.dataclass(frozen=True)
class Program:
    """A program and where it lies.

    Attributes:
        name: one of `NAMES`.
        mesh: of the chips.
        function: jitted.
        arguments: of it, as shapes with shardings.
        shared_bytes: arguments on a chip that are passed twice and exist once.
    """

    name: str
    mesh: Mesh
    function: Any
    arguments: tuple[Any, ...]
    shared_bytes: float = 0.0

    def lower(self) -> jax.stages.Lowered:
        """Ready to be compiled; inside `jax.set_mesh(mesh)`."""
        return self.function.lower(*self.arguments)


def decoder_of(settings: ModelConfig, platform: str = "tpu") -> Decoder:
    """The decoder of a model; only its config is read, and that of a well-known model is known.

    Raises:
        ModelError: as `load_config`.
    """
    known = KNOWN_SHAPES.get(settings.source)
    config = load_config(resolve(settings.source)) if known is None else DecoderConfig.from_hf(known)
    return make_decoder(settings, config, platform)


def shapes_pair(config: Config, platform: str = "tpu") -> Pair:
    """Both models with shapes, in their compute type, in place of weights; they have no tokenizers."""

    def model(settings: ModelConfig) -> Model:
        decoder = decoder_of(settings, platform)
        shapes = nn.unbox(jax.eval_shape(lambda: init_params(decoder)))
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, decoder.dtype), shapes)
        quantized = quantization_of(settings)
        if quantized is not None:
            params = jax.eval_shape(lambda p: quantize_layers(p, quantized), params)
        nothing: Any = None
        return Model(decoder, params, nothing, "", weights=quantized)

    return Pair(model(config.cloud), model(config.edge))


def batch_shapes(config: Config, layers: int) -> Batch:
    """A training batch of P prompts, as shapes."""
    data = config.data
    P, T, S = data.prompts_per_step, data.edge_length, data.response_slots
    rows = P // data.prompts_per_row
    prompts = prompt_shapes(rows, data.prompts_per_row, data.cloud_length, layers).replace(
        tasks_P=_ints(P),
        knowledge_P=jax.ShapeDtypeStruct((P,), jnp.bool_),
        edge_PX=_ints(P, data.edge_prompt_length) if data.edge_prompt_length else None,
    )
    slots, weight = _ints(P, S), jax.ShapeDtypeStruct((P, S), jnp.float32)
    shots = None
    if data.shot_length:
        tokens = _ints(P, data.shot_length)
        shots = EdgeRows(tokens, tokens, tokens, slots, slots, weight)
    tokens = _ints(P, T)
    return Batch(tokens, tokens, tokens, slots, slots, weight, prompts, shots)


def prompt_shapes(rows: int, per_row: int, length: int, layers: int) -> PackedPrompts:
    """Prompts for the cloud, as shapes."""
    tokens = _ints(rows, length)
    return PackedPrompts(tokens, tokens, tokens, tokens, _ints(rows, per_row, layers))


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def on(mesh: Mesh, tree: Any, *axes: str | None) -> Any:
    """The shapes with one sharding, by logical axes."""
    sharding = NamedSharding(mesh, spec(*axes))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def frozen_on(mesh: Mesh, model: Model) -> Any:
    """A model's weights as shapes, split as training splits them."""
    shardings = param_shardings(mesh, lambda: init_params(model.decoder, weights=model.weights))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.params, shardings)


def build(config: Config, pair: Pair, devices: list[Any], names: Sequence[str], sizes: Sizes) -> list[Program]:
    """The named programs.

    Raises:
        ConfigError: when the mesh does not fit the chips, or the batch does not divide among them.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    makers: dict[str, Callable[[], Program]] = {
        "train_step": lambda: train_step(config, pair, mesh),
        "specialise": lambda: specialize(config, pair, mesh),
        "prefill": lambda: prefill(pair, make_mesh(devices=devices), sizes),
        "decode": lambda: decode(pair, make_mesh(devices=devices), sizes),
    }
    return [makers[name]() for name in names]


def train_step(config: Config, pair: Pair, mesh: Mesh) -> Program:
    """The optimizer step that training runs, on the config's method, optimizer, batch and mesh."""
    check_rows(config, mesh)
    generator, optimizer = make_generator(config, pair), make_optimizer(config.train)
    batch = batch_shapes(config, pair.edge.config.num_layers)
    state = jax.eval_shape(lambda f, b: init_state(generator, optimizer, f, b, 0), pair.frozen, batch)
    frozen = {"cloud": frozen_on(mesh, pair.cloud), "edge": frozen_on(mesh, pair.edge)}
    twice = jax.tree.leaves(frozen["edge"]) if share_weights(config) else []
    shared = float(sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in twice))
    arguments = on(mesh, state), frozen, on(mesh, batch, "batch")
    step = make_train_step(generator, pair.edge.decoder, optimizer, config)
    return Program("train_step", mesh, step, arguments, shared)


def specialize(config: Config, pair: Pair, mesh: Mesh) -> Program:
    """One prompt of data.cloud_length tokens, meta tokens included, to merged edge weights; the base is kept.

    To an adapter where the edge is quantized: nothing is merged into it.
    """
    if config.method != GENERATOR.key:
        raise ConfigError(
            f"method {config.method} does not specialize", field="method", remedy="leave specialise out of --programs"
        )
    generator, layers = make_generator(config, pair), pair.edge.config.num_layers
    prompts = prompt_shapes(1, 1, config.data.cloud_length, layers)
    keys = dict.fromkeys(("params", "dropout", "gumbel"), jax.random.key(0))
    variables = jax.eval_shape(generator.init, keys, pair.cloud.params, prompts)
    edge = frozen_on(mesh, pair.edge)

    def adapter(variables: Any, cloud: Any, prompts: Any) -> Any:
        return generator.apply(variables, cloud, prompts).adapter.select(0)

    def merged(variables: Any, cloud: Any, prompts: Any, edge: Any) -> Any:
        return merge(edge, adapter(variables, cloud, prompts))

    arguments = on(mesh, variables), frozen_on(mesh, pair.cloud), on(mesh, prompts)
    step = jax.jit(adapter)
    if pair.edge.weights is None:
        step = jax.jit(merged, out_shardings=jax.tree.map(lambda x: x.sharding, edge))
        arguments += (edge,)
    return Program("specialise", mesh, step, arguments)


def prefill(pair: Pair, mesh: Mesh, sizes: Sizes) -> Program:
    """The merged edge reads `tokens` of every row and gives the logits after the last."""
    decoder, rows = forward_only(pair.edge.decoder), sizes.rows * mesh.size

    def run(params: Any, tokens_BT: jax.Array, positions_BT: jax.Array) -> Any:
        cache = KVCache.empty(decoder.config, rows, sizes.tokens, decoder.dtype)
        hidden, cache = decoder.apply({"params": params}, tokens_BT, positions_BT, cache=cache)
        assert isinstance(hidden, jax.Array)
        return logits_at(decoder, params, hidden[:, -1]), cache

    tokens = on(mesh, _ints(rows, sizes.tokens), "batch")
    arguments = on(mesh, pair.edge.params), tokens, tokens
    return Program("prefill", mesh, jax.jit(run), arguments)


def decode(pair: Pair, mesh: Mesh, sizes: Sizes, adapter: Any = None) -> Program:
    """One token of every row against a full cache, which is written in place.

    `adapter` is one of as many prompts as rows, as shapes, for a batch in which every row has its own specialization.
    """
    decoder, rows = forward_only(pair.edge.decoder), sizes.rows * mesh.size

    def run(params: Any, tokens_B1: jax.Array, positions_B1: jax.Array, cache: KVCache, adapter: Any) -> Any:
        hidden, cache_after = decoder.apply({"params": params}, tokens_B1, positions_B1, cache=cache, adapter=adapter)
        assert isinstance(hidden, jax.Array)
        return logits_at(decoder, params, hidden[:, 0]), cache_after

    cache = jax.eval_shape(lambda: KVCache.empty(decoder.config, rows, sizes.slots, decoder.dtype))
    cache = KVCache(
        k_LBSGH=on(mesh, cache.k_LBSGH, None, "batch"),
        v_LBSGH=on(mesh, cache.v_LBSGH, None, "batch"),
        position_BS=on(mesh, cache.position_BS, "batch"),
        used=on(mesh, cache.used),
    )
    tokens = on(mesh, _ints(rows, 1), "batch")
    arguments = on(mesh, pair.edge.params), tokens, tokens, cache, on(mesh, adapter)
    return Program("decode", mesh, jax.jit(run, donate_argnums=3), arguments)
