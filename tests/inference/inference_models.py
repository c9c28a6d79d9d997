"""Small random models of every family, and what they say token by token without a cache."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.generator.router import Gates
from lora_gen_jax.inference.edge_model import EdgeModel, Prefix

LLAMA = DecoderConfig(
    family="llama",
    vocab_size=67,
    num_layers=2,
    width=32,
    ffn_width=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    attention_scale=8**-0.5,
    tied_embeddings=True,
)
GEMMA = dataclasses.replace(
    LLAMA, family="gemma", norm_offset=1.0, activation="gelu_tanh", embedding_scale=32**0.5, norm_eps=1e-6
)
CONFIGS = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tied_embeddings=False),
    "gemma": GEMMA,
    "gemma2": dataclasses.replace(
        GEMMA,
        family="gemma2",
        post_norms=True,
        attention_softcap=5.0,
        logit_softcap=8.0,
        sliding_window=4,
        windowed_layers=(True, False),
    ),
    "opt": dataclasses.replace(
        LLAMA,
        family="opt",
        num_kv_heads=4,
        norm="layer",
        activation="relu",
        gated_ffn=False,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        rope_theta=None,
        learned_position_offset=2,
    ),
}


class Model(NamedTuple):
    """A decoder with random parameters."""

    decoder: Decoder
    params: Any

    def edge(self, adapter: Any = None, prefix: Prefix | None = None) -> EdgeModel:
        """As what answers, with these beside it."""
        return EdgeModel(self.decoder, self.params, adapter, prefix)

    def logits(self, ids: list[int], adapter: Any = None) -> np.ndarray:
        """Logits [T, V] of one sequence by one uncached forward pass; padded, so that few shapes are compiled."""
        tokens = np.zeros((1, -(-len(ids) // 32) * 32), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(_full(self.decoder, self.params, tokens, adapter))[0, : len(ids)]


@jax.jit(static_argnums=0)
def _full(decoder, params, tokens_BT, adapter):
    hidden, _ = decoder.apply({"params": params}, tokens_BT, adapter=adapter)
    return decoder.apply({"params": params}, hidden, method="logits")


def make_model(config: DecoderConfig, seed: int = 0) -> Model:
    """Weights large enough for tokens to matter, and biases and norms that do something."""
    return Model(Decoder(config), jax.tree.map(lambda x: jnp.asarray(x, float), _weights(config, seed)))


@functools.cache
def _weights(config: DecoderConfig, seed: int) -> Any:
    """In float32, the same numbers for files that compute in float64."""
    with jax.enable_x64(False):
        init = jax.jit(lambda key: nn.unbox(Decoder(config).init(key, jnp.zeros((1, 2), jnp.int32)))["params"])
        leaves, tree = jax.tree.flatten(init(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    leaves = [np.asarray(x) + np.float32(0.15) * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return jax.tree.unflatten(tree, leaves)


def make_gates(config: DecoderConfig, prompts: int) -> GatedPool:
    """A pool of four experts whose effect on the model is plain to see."""
    rng = np.random.default_rng(7)
    pool = {}
    for site in config.ffn_sites:
        inputs, outputs = config.site_shape(site)
        pool[site] = {
            "a": jnp.asarray(rng.standard_normal((4, inputs, 3), np.float32), float),
            "b": jnp.asarray(0.3 * rng.standard_normal((4, 3, outputs), np.float32), float),
        }
    weight, index = jax.lax.top_k(jnp.asarray(rng.random((config.num_layers, prompts, 4), np.float32), float), 2)
    return GatedPool(scanned={"gates": Gates(index, weight, 4)}, shared={"pool": pool}, scale=1.0)
