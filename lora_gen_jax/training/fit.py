"""Remat "fit": what a device keeps for the backward pass, chosen from what its memory leaves.

In: a config, the pair, the mesh, a batch (or its shapes) and a device's bytes. Out: the pair with chosen names in place
of "fit", and a line that says which.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_gen_jax.config import Config
from lora_gen_jax.data.pipeline import Batch
from lora_gen_jax.decoder.flash import fits_flash
from lora_gen_jax.decoder.remat import Result, choose, results_of
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import Model, Pair, share_weights
from lora_gen_jax.training.losses import LOGITS_AT_ONCE
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.step import init_state

MEBIBYTE = 2**20
RESERVED = 0.05
"""The share of a device's memory that is left alone: for the allocator, the program, and what the estimate misses."""


def device_memory() -> int | None:
    """Bytes of the device that has least, the same in all processes, so that they run one program.

    None where one does not say, as on a CPU.
    """
    least = min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()) // MEBIBYTE
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        least = int(np.min(multihost_utils.process_allgather(np.int32(least))))
    return least * MEBIBYTE or None


def fitted(
    config: Config, pair: Pair, mesh: Mesh, batch: Batch, memory: Callable[[], float | None] = device_memory
) -> tuple[Pair, str | None]:
    """The pair for training; as it is, and no line, where no model has remat "fit" or the memory is not known.

    Args:
        config: of the run.
        pair: with weights or with shapes.
        mesh: of the step.
        batch: all rows of a step; only shapes count.
        memory: gives the bytes of a device, or None; asked only where a model has remat "fit".
    """
    chosen = [name for name in ("cloud", "edge") if getattr(config, name).remat == "fit"]
    room = memory() if chosen else None
    if room is None:
        return pair, None
    tokens, lengths = tokens_of(config, pair, mesh, batch)
    results: list[Result] = []
    for name in chosen:
        decoder = getattr(pair, name).decoder
        flash = decoder.attention == "splash" and fits_flash(lengths[name], decoder.config)
        size = jnp.dtype(decoder.dtype).itemsize
        results += results_of(name, decoder.config, tokens[name], size, lengths[name] if flash else 0)
    budget = (1 - RESERVED) * room - needed_bytes(config, pair, mesh, batch)
    kept = choose(results, budget)
    changed, said = {}, []
    for name in chosen:
        names = tuple(r.name for r in kept if r.model == name)
        model: Model = getattr(pair, name)
        changed[name] = dataclasses.replace(model, decoder=model.decoder.clone(remat=names))
        said.append(f"of the {name}'s layers {', '.join(names) or 'nothing'}")
    total = sum(r.bytes for r in kept)
    line = f"kept for the backward pass: {'; '.join(said)} ({total / 1e9:.1f} of {max(budget, 0) / 1e9:.1f} GB)"
    return dataclasses.replace(pair, **changed), line


def tokens_of(config: Config, pair: Pair, mesh: Mesh, batch: Batch) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens that a device has of a step, of which the backward pass needs activations, and the length of a row."""
    reader = make_generator(config, pair).reader
    read, written = batch.prompts.tokens_BT, batch.tokens_PT
    tokens, lengths = {"cloud": 0, "edge": written.size}, {"cloud": read.shape[1], "edge": written.shape[1]}
    if reader is not None and (reader != "cloud" or config.generator.train_cloud):
        tokens[reader] += read.size
    return {name: -(-count // mesh.size) for name, count in tokens.items()}, lengths


def needed_bytes(config: Config, pair: Pair, mesh: Mesh, batch: Batch) -> float:
    """What a device holds when nothing is kept: weights, the training state, each layer's input, one layer at work.

    An estimate: what the compiler needs `lora-gen compile` says.
    """
    generator, optimizer = make_generator(config, pair), make_optimizer(config.train)
    state = jax.eval_shape(lambda f, b: init_state(generator, optimizer, f, b, 0), pair.frozen, batch)
    # The new state takes the old one's place; gradients lie beside it.
    total = float(_bytes(state) + _bytes(state.params))
    pieces = mesh.shape["fsdp"] * mesh.shape["model"]
    frozen = [pair.edge.params] if share_weights(config) else [pair.cloud.params, pair.edge.params]
    total += sum(_bytes(tree) for tree in frozen) / pieces
    tokens, _ = tokens_of(config, pair, mesh, batch)
    working = []
    for name, model in (("cloud", pair.cloud), ("edge", pair.edge)):
        c, size = model.config, jnp.dtype(model.decoder.dtype).itemsize
        total += tokens[name] * c.num_layers * c.width * size
        layer = sum(math.prod(c.site_shape(site)) for site in ("q", "k", "v", "o", *c.ffn_sites))
        # Weights of this layer and the next; results of gate, up and their product, with a gradient, and of attention.
        gathered = 2 * layer * size / mesh.shape["model"] if pieces > 1 or model.weights is not None else 0
        working.append(gathered + tokens[name] * size * (4 * c.ffn_width + 8 * c.width))
    logits = 2 * 4 * min(LOGITS_AT_ONCE, batch.weight_PS.size * pair.edge.config.vocab_size) / mesh.size
    # The edge's unembedding lies whole on every device while it is used.
    c, size = pair.edge.config, jnp.dtype(pair.edge.decoder.dtype).itemsize
    unembedding = c.vocab_size * c.width * size / mesh.shape["model"] if pieces > 1 else 0
    return total + max(working) + logits + unembedding


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
