"""The decoder-only language model that serves as cloud and as edge model.

In: tokens and positions [B, T], an optional adapter and an optional key/value cache.
Out: hidden states [B, T, D] after the final norm; logits on request, for the positions that need them.
It knows no method: adapters enter as pytrees (`lora_gen_jax.adapters.protocol`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_gen_jax.adapters.protocol import SITES, Adapter
from lora_gen_jax.decoder.attention import KVCache, last_of_context, visible, within_window
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.flash import fits_flash
from lora_gen_jax.decoder.layer import Context, Layer, PerLayer
from lora_gen_jax.decoder.layers import RECORDS, Linear, Norm, rotary_angles
from lora_gen_jax.decoder.product import KEPT, product
from lora_gen_jax.decoder.remat import NAMES
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.sharding import constrain, partitioned

# What the backward pass keeps of each layer: everything, the results of linear layers, or only the layer's input. The
# results are named (`kept`): a policy that looks for products does not see those of a custom gradient rule. Until
# training has chosen names for "fit", it is "none".
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT, *SITES),
    "full": jax.checkpoint_policies.nothing_saveable,
    "fit": None,
}

KERNELS = ("auto", "grouped", "xla", "cudnn", "splash")


class Decoder(nn.Module):
    """A decoder-only language model.

    ``Decoder(config).apply({"params": params}, tokens_BT, positions_BT)`` gives hidden states; the methods
    `embed`, `encode` and `logits` are its three stages, for callers that need only one.

    Attributes:
        config: sizes and switches.
        dtype: of activations; parameters keep their own type.
        remat: a key of `REMAT_POLICIES`, or those of `remat.NAMES` that are kept.
        unroll: layers per iteration of the scan.
        attention: one of `KERNELS`; see `attend`. "splash" is the TPU's flash kernel for packed rows, xla for others.
        operands: what large products round their operands to, with results of `dtype` (`product`); None for `dtype`.
    """

    config: DecoderConfig
    dtype: jax.typing.DTypeLike = float
    remat: str | tuple[str, ...] = "none"
    unroll: int = 1
    attention: str = "auto"
    operands: jax.typing.DTypeLike | None = None

    def setup(self):
        c = self.config
        named = isinstance(self.remat, tuple) and set(self.remat) <= set(NAMES)
        if not named and self.remat not in REMAT_POLICIES:
            raise ConfigError(
                f"remat={self.remat!r} is unknown", field="remat", remedy=f"use one of {', '.join(REMAT_POLICIES)}"
            )
        if self.attention not in KERNELS:
            raise ConfigError(
                f"attention={self.attention!r} is unknown", field="attention", remedy=f"use one of {', '.join(KERNELS)}"
            )
        self.embedding = self.table("embed", (c.vocab_size, c.width), ("vocab", "embed"))
        if c.learned_positions:
            rows = c.max_positions + c.learned_position_offset
            self.position_embedding = self.table("positions", (rows, c.width), ("positions", "embed"))
        layer: Any = Layer
        if self.remat not in ("none", "fit"):
            names = jax.checkpoint_policies.save_only_these_names
            policy = REMAT_POLICIES[self.remat] if isinstance(self.remat, str) else names(*self.remat)
            layer = nn.remat(Layer, policy=policy, prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, RECORDS: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  (flax types it as an int)
            length=c.num_layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        # At initialization there is nothing to reinterpret.
        if self.operands is not None and not self.is_initializing():
            layers = nn.map_variables(layers, "params", trans_in_fn=_bits)
        self.layers = layers(c, self.dtype, self.attention, self.operands)
        self.final_norm = Norm(c, self.dtype)
        if not c.tied_embeddings:
            self.unembed = Linear(
                c.vocab_size, ("embed", "vocab"), dtype=self.dtype, out_dtype=float, operands=self.operands
            )

    def table(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> nn.Module:
        return _Table(shape, axes, name=name)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        *,
        segments_BT: jax.Array | None = None,
        packed: bool = False,
        adapter: Adapter | None = None,
        cache: KVCache | None = None,
        prefix: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Tokens to hidden states.

        Args:
            tokens_BT: ids below `vocab_size`; the caller checks, an id beyond it would read the last row.
            positions_BT: position of each token in its sequence, -1 for padding; 0, 1, 2, … when left out.
            segments_BT: which of several sequences packed into a row a token is of; see `visible`.
            packed: a promise that the tokens of a segment stand in their order, and that segment 0 is padding and
                nothing else: what a flash kernel needs, which knows only slots and segments. On a CPU it spares half
                of attention.
            adapter: a method's adapter; None for the base model.
            cache: keys and values of earlier tokens; must have T free slots.
            prefix: keys and values of one row that all rows begin with; it is only read, and not repeated for them.

        Returns:
            hidden states [B, T, D] after the final norm, and the cache with these tokens added (None without).
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
        hidden, cache = self.encode(
            self.embed(tokens_BT),
            positions_BT,
            segments_BT=segments_BT,
            packed=packed,
            adapter=adapter,
            cache=cache,
            prefix=prefix,
        )
        if self.is_initializing():
            self.logits(hidden[:, -1:])
        return hidden, cache

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Input embeddings [B, T, D]."""
        x = constrain(self.embedding(tokens_BT).astype(self.dtype), "batch", "length", None)
        # transformers rounds Gemma's √D to the compute type before multiplying.
        return x if self.config.embedding_scale == 1.0 else x * jnp.asarray(self.config.embedding_scale, self.dtype)

    def encode(
        self,
        x_BTD,
        positions_BT,
        *,
        segments_BT=None,
        packed=False,
        adapter=None,
        cache=None,
        prefix=None,
        pool_BMT=None,
        learned_BT=None,
    ):
        """Input embeddings to hidden states; arguments and results as of `__call__`.

        Where positions are learned, `learned_BT` has the row of the table for every token, -1 for a token that gets
        none; left out, its position. What a token sees goes by `positions_BT` all the same.

        With `pool_BMT`, every layer also records Σ_t pool[b, m, t]·x[b, t] of its output: apply with
        ``mutable=[RECORDS]`` and read ``records_of(collections)[POOLED]``, [L, B, M, D] in fp32.
        """
        c = self.config
        slot = None if cache is None else cache.used
        cache = None if cache is None else cache.advance(positions_BT)
        key_BS = positions_BT if cache is None else cache.position_BS
        segments = None
        if segments_BT is not None:
            segments = (segments_BT, segments_BT if cache is None else cache.segments(segments_BT))
        if prefix is not None:
            before_BS = jnp.broadcast_to(prefix.position_BS, (positions_BT.shape[0], prefix.position_BS.shape[1]))
            key_BS = jnp.concatenate([before_BS, key_BS], axis=1)
            if segments is not None:
                segments = (segments[0], jnp.concatenate([jnp.zeros_like(before_BS), segments[1]], axis=1))
        window = c.sliding_window if any(c.windowed_layers) else None
        mask = visible(positions_BT, key_BS, segments)
        if c.learned_positions:
            x_BTD = x_BTD + self._placed(positions_BT, learned_BT)
        context = Context(
            mask_BTS=mask,
            window_BTS=None if window is None else mask & within_window(positions_BT, key_BS, window),
            cos_sin=None if c.learned_positions else rotary_angles(c, jnp.maximum(positions_BT, 0)),
            adapter=None if adapter is None else adapter.replace(scanned=None, operands=self.operands),
            slot=slot,
            packed_BT=segments_BT if packed and self._flash(x_BTD.shape[1], cache, prefix) else None,
            last_BT=None if adapter is None else last_of_context(positions_BT, segments_BT),
            pool_BMT=pool_BMT,
            ordered=packed and cache is None and prefix is None,
        )
        per_layer = PerLayer(
            adapter=None if adapter is None else adapter.scanned,
            index=jnp.arange(c.num_layers, dtype=jnp.int32),
            windowed=None if window is None else jnp.array(c.windowed_layers),
            prefix=None if prefix is None else (prefix.k_LBSGH, prefix.v_LBSGH),
        )
        kv = None if cache is None else (cache.k_LBSGH, cache.v_LBSGH)
        (x_BTD, kv), _ = self.layers((x_BTD, kv), per_layer, context)
        cache = None if cache is None else cache.replace(k_LBSGH=kv[0], v_LBSGH=kv[1])
        return self.final_norm(x_BTD), cache

    def _placed(self, positions_BT: jax.Array, learned_BT: jax.Array | None) -> jax.Array:
        """Learned embeddings of positions [B, T, D]; zeros where `learned_BT` is -1."""
        rows_BT, offset = positions_BT if learned_BT is None else learned_BT, self.config.learned_position_offset
        placed_BTD = self.position_embedding(jnp.maximum(rows_BT, 0) + offset).astype(self.dtype)
        if learned_BT is None:
            return placed_BTD
        return jnp.where(learned_BT[:, :, None] >= 0, placed_BTD, jnp.zeros_like(placed_BTD))

    def _flash(self, length: int, cache: Any, prefix: Any) -> bool:
        return self.attention == "splash" and cache is None and prefix is None and fits_flash(length, self.config)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Next-token logits [B, T, V] in fp32, soft-capped where the family says so."""
        if self.config.tied_embeddings:
            logits = self.embedding.attend(hidden_BTD, self.operands)
        else:
            logits = self.unembed(hidden_BTD)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _bits(tree: Any) -> Any:
    """Kernels in bf16 as 16-bit integers, which `Linear` reads as bf16 again.

    XLA slices bf16 on a CPU by way of fp32, all layers' weights anew in every pass.
    """

    def bits(path: Any, x: jax.Array) -> jax.Array:
        kernel = path[-1].key == "kernel" and x.dtype == jnp.bfloat16
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if kernel else x

    return jax.tree_util.tree_map_with_path(bits, tree)


class _Table(nn.Module):
    """An embedding table that can also serve as the unembedding."""

    shape: tuple[int, int]
    axes: tuple[str, str]

    def setup(self):
        init = partitioned(nn.initializers.normal(0.02), *self.axes)
        self.embedding = self.param("embedding", init, self.shape)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        # Every device looks up its columns of the rows that `fsdp` shares; moving those is less than gathering the
        # table.
        x_BTD = jnp.take(self.embedding, constrain(ids_BT, "lookup", None), axis=0, mode="clip")
        return constrain(x_BTD, "lookup", None, "embed")

    def attend(self, hidden_BTD: jax.Array, operands: jax.typing.DTypeLike | None = None) -> jax.Array:
        stored = hidden_BTD.dtype if operands is None else operands
        table = constrain(self.embedding.astype(stored), self.axes[0], None)
        if operands is not None:
            return product(hidden_BTD, table.T, operands)
        return jnp.einsum("btd,vd->btv", hidden_BTD, table, preferred_element_type=float)
