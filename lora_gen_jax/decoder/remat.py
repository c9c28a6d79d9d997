"""What the backward pass keeps of a layer, by name, and which of these names fit into a budget of memory.

In: a model's sizes and the tokens that a device has of a step. Out: `Result`s, what each takes and saves; and of
several models' results those that are kept. Names are the linear layers' (`SITES`) and `ATTENTION`, which the flash
kernel gives.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_gen_jax.adapters.protocol import SITES
from lora_gen_jax.decoder.config import DecoderConfig

ATTENTION = "attention"
"""The flash kernel's output, with the statistics of its softmax."""

NAMES = (*SITES, ATTENTION)


class Result(NamedTuple):
    """A named result of all layers of a model.

    Attributes:
        model: whose it is.
        name: one of `NAMES`.
        bytes: that a device keeps.
        macs: multiply-adds that it then does not repeat.
    """

    model: str
    name: str
    bytes: int
    macs: int


def results_of(model: str, config: DecoderConfig, tokens: int, itemsize: int, flash_length: int = 0) -> list[Result]:
    """What can be kept of a model.

    The result of `down` is read again only where a norm follows it. Without the flash kernel the scores of attention
    are computed again, whatever is kept of its output.

    Args:
        model: its name.
        config: its sizes.
        tokens: that a device has.
        itemsize: bytes of an activation.
        flash_length: tokens of a row, where the flash kernel reads it; else 0.
    """
    found, each = [], tokens * config.num_layers
    for site in ("q", "k", "v", "o", *config.ffn_sites):
        inputs, outputs = config.site_shape(site)
        if site != "down" or config.post_norms:
            found.append(Result(model, site, each * outputs * itemsize, each * inputs * outputs))
    if flash_length:
        width = config.num_heads * config.head_dim
        # Scores and mixing, below the diagonal. The statistics are a float32 for each head.
        size = width * itemsize + 4 * config.num_heads
        found.append(Result(model, ATTENTION, each * size, each * width * flash_length))
    return found


def choose(results: Sequence[Result], budget: float) -> list[Result]:
    """Those that save most multiply-adds within `budget` bytes; nothing where the budget is not positive.

    All subsets are compared: two models have at most sixteen results.
    """
    subsets = np.arange(2 ** len(results))[:, None] >> np.arange(len(results))[None] & 1
    sizes = subsets @ np.array([r.bytes for r in results], float)
    saved = np.where(sizes <= budget, subsets @ np.array([r.macs for r in results], float), -1.0)
    best = subsets[np.argmax(saved)]
    return [result for result, keep in zip(results, best, strict=True) if keep]
