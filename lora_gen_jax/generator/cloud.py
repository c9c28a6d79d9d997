"""The cloud side of the generator: a frozen language model reads prompts once and emits meta tokens.

In: prompts packed into rows, each followed by L slots for meta tokens. Out: meta tokens [P, L, C], the hidden
states at those slots. With `pooled_layers`, the prompt's mean states after those layers follow each meta token. One
causal pass; no logits are ever computed.
"""

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_gen_jax.adapters.lora import LoRA, trained_factors
from lora_gen_jax.decoder.layers import POOLED, RECORDS, records_of
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.sharding import constrain

if TYPE_CHECKING:
    from lora_gen_jax.config import GeneratorConfig

CLOUD_SITES = ("q", "v")


class PackedPrompts(struct.PyTreeNode):
    """Prompts and their meta slots, M prompts in each of B rows; P = B·M prompts in row order.

    Attributes:
        tokens_BT: prompt tokens; 0 at meta slots and padding.
        positions_BT: position within the own prompt, meta slots included; -1 for padding.
        segments_BT: 1 to M, which of the row's prompts a token is of; 0 for padding.
        meta_BT: which meta token stands in a slot, 0 to L-1; -1 elsewhere.
        slots_BML: where in the row the meta tokens of each prompt are.
        tasks_P: in training, the number of each prompt's task among those trained on.
        knowledge_P: in training, whether that task asks for knowledge (`data.knowledge_tasks`).
        edge_PX: the prompts in the edge model's ids, -1 for padding; None unless `data.edge_prompt_length` asks.
    """

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    meta_BT: Any
    slots_BML: Any
    tasks_P: Any = None
    knowledge_P: Any = None
    edge_PX: Any = None


def pack_prompts(prompts: list[list[int]], num_meta: int, rows: int, length: int) -> PackedPrompts:
    """NumPy arrays for prompts given as token ids; consecutive prompts share a row.

    Raises:
        DataError: when prompts do not divide among rows, one is empty, or the prompts of a row and their meta slots
            exceed `length`.
    """
    if rows < 1 or not prompts or len(prompts) % rows:
        raise DataError(f"{len(prompts)} prompts cannot be shared evenly by {rows} rows", field="rows")
    per_row = len(prompts) // rows
    shape = (rows, length)
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    segments, meta = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    slots = np.zeros((rows, per_row, num_meta), np.int32)
    for i, prompt in enumerate(prompts):
        row, place = divmod(i, per_row)
        start = int(np.sum(positions[row] >= 0))
        middle, end = start + len(prompt), start + len(prompt) + num_meta
        if len(prompt) == 0:
            raise DataError("a prompt is empty", field="prompts", remedy="give the task a description or shots")
        if end > length:
            raise DataError(
                f"prompts of {end - per_row * num_meta} tokens with {per_row * num_meta} meta tokens do not fit the"
                f" cloud's {length}",
                field="prompts",
                remedy="shorten the prompt, take fewer shots, or raise the limit",
            )
        tokens[row, start:middle] = prompt
        positions[row, start:end] = np.arange(end - start)
        segments[row, start:end] = place + 1
        meta[row, middle:end] = np.arange(num_meta)
        slots[row, place] = np.arange(middle, end)
    return PackedPrompts(tokens, positions, segments, meta, slots)


class CloudEncoder(nn.Module):
    """Meta embeddings and the LoRA on the cloud's q and v; the cloud's own weights come in frozen.

    Attributes:
        decoder: the cloud model.
        num_meta: L, the edge model's layers.
        settings: of the generator.
        meta_start: the token whose embedding meta embeddings start around; None for small noise only.
    """

    decoder: Decoder
    num_meta: int
    settings: "GeneratorConfig"
    meta_start: int | None = None

    @nn.compact
    def __call__(self, frozen: Any, prompts: PackedPrompts, train: bool = False) -> jax.Array:
        """Meta tokens [P, L, C] in fp32. With `train` and dropout it needs the rng "dropout".

        With N pooled layers they are [P, L, (1 + N)·C], or [P, 1, N·C] where the router reads pooled states only.

        Raises:
            ConfigError: when the prompts were packed with another number of meta tokens, or a pooled layer does not
                exist.
        """
        # Not a part of this module: its weights come in.
        decoder, s = self.decoder.clone(parent=None, name=None), self.settings
        c = decoder.config
        if (packed := prompts.slots_BML.shape[2]) != self.num_meta:
            raise ConfigError(
                f"the prompts were packed with {packed} meta tokens each, the edge model has {self.num_meta} layers",
                field="prompts",
                remedy=f"pack_prompts(prompts, {self.num_meta}, …)",
            )
        count = 1 if s.shared_meta_token else self.num_meta

        def start(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            noise = nn.initializers.normal(0.02)(key, shape)
            if self.meta_start is None:
                return noise
            return noise + frozen["embed"]["embedding"][self.meta_start].astype(noise.dtype)[None]

        meta_LC = self.param("meta_embedding", start, (count, c.width))
        x_BTC: Any = decoder.apply({"params": frozen}, prompts.tokens_BT, method="embed")
        # The learned embeddings are of the size of the model's own inputs, whatever those are scaled by.
        scale = jnp.asarray(c.embedding_scale, float)
        own_BTC = (meta_LC * scale)[jnp.maximum(prompts.meta_BT, 0) % count].astype(decoder.dtype)
        x_BTC = jnp.where((prompts.meta_BT >= 0)[..., None], own_BTC, x_BTC)
        rngs = {"dropout": self.make_rng("dropout")} if train and s.dropout > 0 else {}
        (hidden_BTC, _), collections = decoder.apply(
            {"params": frozen},
            x_BTC,
            prompts.positions_BT,
            segments_BT=prompts.segments_BT,
            packed=True,
            adapter=self._lora(),
            pool_BMT=mean_weights(prompts) if s.pooled_layers else None,
            rngs=rngs,
            mutable=[RECORDS],
            method="encode",
        )
        B, M, L = prompts.slots_BML.shape
        hidden_BTC = constrain(hidden_BTC, "batch", None, None)
        meta_BXC = jnp.take_along_axis(hidden_BTC, prompts.slots_BML.reshape(B, M * L, 1), axis=1)
        states_PLX = meta_BXC.reshape(B * M, L, c.width).astype(float)
        if s.pooled_layers:
            pooled_P1X = self._pooled(records_of(collections)[POOLED]).reshape(B * M, 1, -1)
            if s.router_input == "pooled":
                states_PLX = pooled_P1X
            else:
                repeated_PLX = jnp.broadcast_to(pooled_P1X, (B * M, L, pooled_P1X.shape[-1]))
                states_PLX = jnp.concatenate([states_PLX, repeated_PLX], axis=-1)
        return states_PLX if s.train_cloud else jax.lax.stop_gradient(states_PLX)

    def _pooled(self, means_NBMC: jax.Array) -> jax.Array:
        """[B, M, pooled layers, C] of the mean states after all N layers."""
        for layer in self.settings.pooled_layers:
            if not 1 <= layer <= len(means_NBMC):
                raise ConfigError(
                    f"generator.pooled_layers names layer {layer}, but the cloud model has {len(means_NBMC)}",
                    field="generator.pooled_layers",
                    remedy="name layers from 1 on",
                )
        return jnp.stack([means_NBMC[layer - 1] for layer in self.settings.pooled_layers], axis=2)

    def _lora(self) -> LoRA | None:
        s = self.settings
        if s.cloud_rank == 0:
            return None
        factors = trained_factors(self, self.decoder.config, CLOUD_SITES, s.cloud_rank)
        return LoRA(scanned=factors, scale=s.cloud_alpha / s.cloud_rank, dropout_rate=s.dropout)


def mean_weights(prompts: PackedPrompts) -> jax.Array:
    """[B, M, T]: 1/n at the n tokens of each prompt, its meta slots left out; 0 elsewhere."""
    places_M = jnp.arange(1, prompts.slots_BML.shape[1] + 1)
    own_BMT = (prompts.segments_BT[:, None, :] == places_M[None, :, None]) & (prompts.meta_BT < 0)[:, None, :]
    count_BM1 = jnp.sum(own_BMT, axis=-1, keepdims=True)
    return own_BMT.astype(float) / jnp.maximum(count_BM1, 1).astype(float)
