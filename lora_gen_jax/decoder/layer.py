"""One layer of a decoder: attention and FFN, in the form that a scan over layers wants.

In: the residual stream [B, T, D], what every layer reads alike (`Context`) and what the scan slices (`PerLayer`). Out:
the stream after the layer, and the keys and values it added to the cache.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from lora_gen_jax.adapters.protocol import FFN_INPUT, Adapter, FrozenFFN
from lora_gen_jax.decoder.attention import attend
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.flash import flash_attention
from lora_gen_jax.decoder.layers import ACTIVATIONS, POOLED, RECORDS, Linear, Norm, dropout_key, record, rotate
from lora_gen_jax.sharding import constrain


class Context(struct.PyTreeNode):
    """What every layer reads alike.

    Attributes:
        mask_BTS: visible keys.
        window_BTS: visible keys of windowed layers; None where the model has none.
        cos_sin: rotary angles; None for learned positions.
        adapter: the adapter without its scanned part; None for the base model.
        slot: first cache slot that this call fills; None without a cache.
        packed_BT: segments, where a flash kernel that knows them can do the call; else None.
        last_BT: whether a token is the last of its row's context; None without an adapter.
        pool_BMT: weights of M sums over a row's tokens that every layer records of its output; None for none.
        ordered: no slot sees a later one; see `attend`.
    """

    mask_BTS: jax.Array
    window_BTS: jax.Array | None
    cos_sin: tuple[jax.Array, jax.Array] | None
    adapter: Any
    slot: jax.Array | None
    packed_BT: jax.Array | None
    last_BT: jax.Array | None = None
    pool_BMT: jax.Array | None = None
    ordered: bool = struct.field(pytree_node=False, default=False)


class PerLayer(struct.PyTreeNode):
    """What the scan slices.

    Attributes:
        adapter: the adapter's scanned part.
        index: of the layer.
        windowed: whether the layer is; None where none is.
        prefix: keys and values [1, S, G, H] that all rows begin with; None without.
    """

    adapter: Any
    index: jax.Array
    windowed: jax.Array | None
    prefix: tuple[jax.Array, jax.Array] | None


class Attention(nn.Module):
    """Grouped-query attention with linear layers q, k, v, o."""

    config: DecoderConfig
    dtype: jax.typing.DTypeLike
    kernel: str
    operands: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x_BTD, kv, per_layer: PerLayer, context: Context, adapter: Adapter | None):
        c, (B, T, _) = self.config, x_BTD.shape

        def heads(name: str, count: int) -> jax.Array:
            axes = ("embed", "heads" if name == "q" else "kv_heads")
            linear = Linear(count * c.head_dim, axes, c.qkv_bias, self.dtype, operands=self.operands, name=name)
            y = linear(x_BTD, adapter)
            return constrain(y.reshape(B, T, count, c.head_dim), "batch", None, axes[1], None)

        q, k, v = heads("q", c.num_heads), heads("k", c.num_kv_heads), heads("v", c.num_kv_heads)
        if context.cos_sin is not None:
            q, k = rotate(q, context.cos_sin), rotate(k, context.cos_sin)
        if kv is not None and context.slot is not None:
            first = jnp.zeros_like(context.slot)
            start = (per_layer.index, first, context.slot, first, first)
            kv = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), start)
                for old, new in zip(kv, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(x, per_layer.index, keepdims=False) for x in kv)
        mask_BTS = context.mask_BTS
        if per_layer.windowed is not None and context.window_BTS is not None:
            mask_BTS = jnp.where(per_layer.windowed, context.window_BTS, mask_BTS)
        if context.packed_BT is not None:
            y = flash_attention(q, k, v, context.packed_BT, c)
        else:
            parts = [(k, v)] if per_layer.prefix is None else [per_layer.prefix, (k, v)]
            y = attend(q, parts, mask_BTS, c, self.kernel, self.operands, context.ordered)
        y = constrain(y.reshape(B, T, c.num_heads * c.head_dim), "batch", None, "heads")
        out = Linear(c.width, ("heads", "embed"), c.out_bias, self.dtype, operands=self.operands, name="o")
        return out(y, adapter), kv


class FFN(nn.Module):
    """act(x·gate) * (x·up) · down, or act(x·up) · down without a gate; an adapter may compute something else."""

    config: DecoderConfig
    dtype: jax.typing.DTypeLike
    operands: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, adapter: Adapter | None) -> jax.Array:
        c = self.config
        wide, narrow = (c.ffn_width, ("embed", "mlp")), (c.width, ("mlp", "embed"))
        linear = {
            site: Linear(
                *(narrow if site == "down" else wide), c.ffn_bias, self.dtype, operands=self.operands, name=site
            )
            for site in c.ffn_sites
        }

        def activate(gate: jax.Array | None, up: jax.Array) -> jax.Array:
            act = ACTIVATIONS[c.activation]
            h_BTF = act(up) if gate is None else act(gate) * up
            return constrain(h_BTF, "batch", None, "mlp")

        if adapter is not None:
            record(self, adapter, FFN_INPUT, x_BTD)
            frozen = FrozenFFN(lambda site, x: linear[site](x), activate, tuple(linear))
            y_BTD = adapter.ffn(x_BTD, frozen, dropout_key(self))
            if y_BTD is not None:
                return y_BTD.astype(self.dtype)
        up = linear["up"](x_BTD, adapter)
        gate = linear["gate"](x_BTD, adapter) if c.gated_ffn else None
        return linear["down"](activate(gate, up), adapter)


class Layer(nn.Module):
    """One layer, in the form `nn.scan` wants: carry, slice, broadcast -> carry, output."""

    config: DecoderConfig
    dtype: jax.typing.DTypeLike
    kernel: str
    operands: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, carry, per_layer: PerLayer, context: Context):
        c, (x, kv) = self.config, carry
        adapter = None if context.adapter is None else context.adapter.replace(scanned=per_layer.adapter)

        def norm(name: str, y: jax.Array) -> jax.Array:
            return Norm(c, self.dtype, name=name)(y)

        attention = Attention(c, self.dtype, self.kernel, self.operands, name="attention")
        y, kv = attention(norm("attention_norm", x), kv, per_layer, context, adapter)
        x = constrain(x + (norm("post_attention_norm", y) if c.post_norms else y), "batch", "length", None)
        y = FFN(c, self.dtype, self.operands, name="ffn")(norm("ffn_norm", x), adapter)
        x = constrain(x + (norm("post_ffn_norm", y) if c.post_norms else y), "batch", "length", None)
        if adapter is not None and (changed := adapter.stream(x, context.last_BT)) is not None:
            x = changed
        if context.pool_BMT is not None and not self.is_initializing():
            self.sow(RECORDS, POOLED, jnp.einsum("bmt,btd->bmd", context.pool_BMT, x.astype(float)))
        return (x, kv), None
