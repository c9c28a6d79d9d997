"""Writes a decoder as a Hugging Face model directory, which transformers loads as well.

In: a parameter tree and the model's config.json as a dictionary. Out: config.json and safetensors, in one file or in
shards with an index. The table of tensor names is the one that loading uses, run the other way round.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.families import FAMILIES
from lora_gen_jax.decoder.pretrained.layout import Leaf, leaves
from lora_gen_jax.errors import ConfigError

# transformers' default, which other tools are tested with.
SHARD_BYTES = 5_000_000_000


def save_pretrained(directory: Path, hf_config: dict[str, Any], params: Any, tokenizer: Any, dtype: Any) -> None:
    """Writes the model and its tokenizer into `directory`, which exists.

    Args:
        directory: where to write.
        hf_config: what config.json will hold; ``DecoderConfig.from_hf`` of it describes `params`.
        params: kernels [L, inputs, outputs], norms [L, D], embedding [V, D].
        tokenizer: of transformers.
        dtype: that the weights are stored in.

    Raises:
        ConfigError: for a weight beyond the dtype's range.
    """
    save_config(directory, hf_config, dtype)
    save_weights(directory, DecoderConfig.from_hf(hf_config), params, dtype)
    tokenizer.save_pretrained(directory)


def save_config(directory: Path, hf_config: dict[str, Any], dtype: Any) -> None:
    """Writes config.json of the causal language model, whatever class and dtype the original named."""
    # Said of the original: where it was, what it was stored in (transformers 4 and 5), how it was compressed.
    stale = ("_name_or_path", "torch_dtype", "quantization_config")
    written = {name: value for name, value in hf_config.items() if name not in stale}
    written |= {"architectures": [FAMILIES[hf_config["model_type"]].architecture], "dtype": np.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def save_weights(
    directory: Path, config: DecoderConfig, params: Any, dtype: Any, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes model.safetensors, or model-00001-of-0000N.safetensors and so on with model.safetensors.index.json.

    Tied embeddings are stored once. Beside `params` one shard at a time is held.

    Args:
        directory: where to write; exists.
        config: of the model.
        params: as `save_pretrained`.
        dtype: that the weights are stored in.
        shard_bytes: largest shard; a tensor that is larger has one of its own.

    Raises:
        ConfigError: for a weight beyond the dtype's range.
    """
    shards = _plan(config, np.dtype(dtype).itemsize, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total = 0
    for file, shard in zip(names, shards, strict=True):
        tensors = {name: cast(_stored(params, leaf, layer), dtype, name) for name, (leaf, layer) in shard.items()}
        total += sum(value.nbytes for value in tensors.values())
        write_tensors(directory / file, tensors)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file that PyTorch's readers accept, and that others than its owner may read."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it 0600, which a server of another user cannot open


def cast(values: Any, dtype: Any, name: str) -> np.ndarray:
    """The values in another dtype, contiguous.

    Raises:
        ConfigError: when one of them is beyond the dtype's range.
    """
    given = np.asarray(values)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(given, dtype)
    if np.dtype(dtype) == np.float16 and np.isinf(stored).any() and np.isfinite(given).all():
        raise ConfigError(
            f"dtype float16 cannot hold {name}, whose values reach {np.abs(given).max():.3g}",
            field="dtype",
            remedy="use bfloat16 or float32",
        )
    return stored


def _plan(config: DecoderConfig, itemsize: int, shard_bytes: int) -> list[dict[str, tuple[Leaf, int]]]:
    # By layers where a leaf stacks them, so that whoever loads one shard has whole layers, as transformers writes them.
    table = list(leaves(config))
    places = [
        (leaf.tensor_names(config.num_layers)[layer], leaf, layer)
        for layer in range(config.num_layers)
        for leaf in table
        if leaf.stacked or layer == 0
    ]
    shards: list[dict[str, tuple[Leaf, int]]] = [{}]
    filled = 0
    for name, leaf, layer in places:
        size = int(np.prod(leaf.shape)) * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = leaf, layer
        filled += size
    return shards


def _stored(params: Any, leaf: Leaf, layer: int) -> np.ndarray:
    node = params
    for key in leaf.path:
        node = node[key]
    if leaf.stacked:
        # One layer at a time leaves the device; a NumPy tree stays where it is.
        array = isinstance(node, jax.Array)
        node = jax.lax.dynamic_index_in_dim(node, layer, keepdims=False) if array else node[layer]
    values = np.asarray(node)
    return values.T if leaf.transpose else values
