"""Pretrained models: from what a user writes for a model to its config, parameters, tokenizer and fingerprint.

Every function takes a source: a Hugging Face directory, a ``.gguf`` file, a known name such as ``smollm2-135m``, a
hub id ``org/name``, or an already resolved `Source`. All raise `ModelError` with the file and the remedy.
"""

import os
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.pretrained.assembly import Checkpoint, assemble
from lora_gen_jax.decoder.pretrained.content_hash import fingerprint_of
from lora_gen_jax.decoder.pretrained.hf import HFCheckpoint, read_hf_config
from lora_gen_jax.decoder.pretrained.layout import Leaf, leaves
from lora_gen_jax.decoder.pretrained.sources import KNOWN_MODELS, Source, cache_directory, resolve
from lora_gen_jax.decoder.pretrained.tokenizer import load_tokenizer

if TYPE_CHECKING:
    AnySource = str | os.PathLike[str] | Source

__all__ = [
    "KNOWN_MODELS",
    "Leaf",
    "Source",
    "cache_directory",
    "fingerprint",
    "leaves",
    "load_config",
    "load_hf_config",
    "load_params",
    "load_tokenizer",
    "resolve",
]


def load_hf_config(source: "AnySource") -> dict[str, Any]:
    """The model's ``config.json`` as a dictionary; for GGUF, what that file would hold."""
    found = resolve(source)
    if found.kind == "hf":
        return read_hf_config(found.model)
    from lora_gen_jax.decoder.pretrained.gguf import read_gguf_config

    return read_gguf_config(found.model)


def load_config(source: "AnySource") -> DecoderConfig:
    """The model's sizes and switches; reads no weights."""
    return DecoderConfig.from_hf(load_hf_config(source))


def load_params(
    source: "AnySource",
    config: DecoderConfig | None = None,
    dtype: Any = jnp.float32,
    shardings: Any = None,
    matrices: Any = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """The model's parameters as nested dicts of jax arrays.

    Args:
        source: of the model.
        config: of the model, if it is known already.
        dtype: of the parameters.
        shardings: None, one `jax.sharding.Sharding`, or the parameters' tree of them. Each process then reads only the
            slices that its devices hold.
        matrices: dtype of kernels and embedding tables, where it is another.
        weights: a key of `quantized.FORMATS`, that the layers' kernels are quantized to while they are read, block by
            block; None leaves them floats.

    Returns:
        Kernels [L, inputs, outputs], norms [L, D], embedding [V, D]; see `leaves` for all of them. Beside a quantized
        kernel are its scales.
    """
    found = resolve(source)
    config = load_config(found) if config is None else config
    return assemble(config, _checkpoint(found), dtype, shardings, matrices, weights)


def fingerprint(source: "AnySource") -> str:
    """16 hex digits that identify the stored weights, whatever dtype, quantization or sharding they are loaded with."""
    found = resolve(source)
    return fingerprint_of(load_config(found), _checkpoint(found))


def _checkpoint(found: Source) -> Checkpoint:
    if found.kind == "hf":
        return HFCheckpoint(found.model)
    from lora_gen_jax.decoder.pretrained.gguf import GGUFCheckpoint

    return GGUFCheckpoint(found.model)
