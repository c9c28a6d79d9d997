"""Causal attention within packed segments by the TPU's flash kernel, split over a mesh.

In: queries, keys, values and a segment per slot. Out: attention outputs. Scores never leave the chip's own memory, so
a training pass on rows of 2048 tokens and more is bound by its matmuls. The kernel is JAX's splash attention; this file
shapes its arguments, and tells it which rows and heads each device has.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from lora_gen_jax.decoder.remat import ATTENTION
from lora_gen_jax.sharding import divided_spec, mesh_size

# The kernel works on blocks of this many slots at least.
BLOCK = 128
LARGEST_BLOCK = 512


def fits_flash(length: int, config: Any) -> bool:
    """Whether rows of `length` slots can be done: whole blocks, and no window that hides a part of a row."""
    window = config.sliding_window if any(config.windowed_layers) else None
    return length % BLOCK == 0 and (window is None or window >= length)


def flash_attention(
    q_BTNH: jax.Array,
    k_BTGH: jax.Array,
    v_BTGH: jax.Array,
    segments_BT: jax.Array,
    config: Any,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention with grouped heads, [B, T, N, H]: slot t sees slots s <= t of its own segment.

    Args:
        q_BTNH, k_BTGH, v_BTGH: queries, keys and values; G divides N.
        segments_BT: of each slot; padding needs a segment of its own.
        config: supplies `attention_scale` and `attention_softcap`.
        interpret: run the kernel's Python on any platform, slowly, for tests.
    """
    heads, shards = q_BTNH.shape[2], mesh_size("heads")
    # A key head that several devices need is repeated, so that each has one of its own.
    if heads % shards == 0 and (repeats := shards // math.gcd(k_BTGH.shape[2], shards)) > 1:
        k_BTGH, v_BTGH = (jnp.repeat(x, repeats, axis=2) for x in (k_BTGH, v_BTGH))
    kernel = functools.partial(_local, config=config, interpret=interpret)
    if (mesh := jax.sharding.get_abstract_mesh()).empty or mesh.size == 1:
        return kernel(q_BTNH, k_BTGH, v_BTGH, segments_BT)
    specs = [divided_spec(x.shape, "batch", None, "heads", None) for x in (q_BTNH, k_BTGH, v_BTGH)]
    rows = divided_spec(segments_BT.shape, "batch", None)
    split = jax.shard_map(kernel, in_specs=(*specs, rows), out_specs=specs[0], check_vma=False)
    return split(q_BTNH, k_BTGH, v_BTGH, segments_BT)


def _local(
    q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array, segments_BT: jax.Array, *, config: Any, interpret: bool
) -> jax.Array:
    length, heads = q_BTNH.shape[1:3]
    block = math.gcd(length, LARGEST_BLOCK)
    sizes = dict.fromkeys(_BLOCK_NAMES, block)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=config.attention_softcap,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    q_BTNH = q_BTNH * jnp.asarray(config.attention_scale, q_BTNH.dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTGH, v_BTGH))
    y_BNTH: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments_BT, segments_BT))
    return y_BNTH.transpose(0, 2, 1, 3).astype(q_BTNH.dtype)


_BLOCK_NAMES = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)
