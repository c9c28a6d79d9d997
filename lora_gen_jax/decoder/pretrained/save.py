"""Writes a decoder as a Hugging Face model directory, which transformers loads as well.

In: a parameter tree, the model's config.json as a dictionary, a tokenizer. Out: config.json, model.safetensors and the
tokenizer's files. The table of tensor names is the one that loading uses, run the other way round.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.pretrained.layout import leaves


def save_pretrained(directory: Path, hf_config: dict[str, Any], params: Any, tokenizer: Any, dtype: Any) -> None:
    """Writes the model into `directory`, which exists.

    Args:
        directory: where to write.
        hf_config: what config.json will hold; ``DecoderConfig.from_hf`` of it describes `params`.
        params: kernels [L, inputs, outputs], norms [L, D], embedding [V, D].
        tokenizer: of transformers.
        dtype: that the weights are stored in.
    """
    config, tensors = DecoderConfig.from_hf(hf_config), {}
    for leaf in leaves(config):
        node = params
        for key in leaf.path:
            node = node[key]
        stored = np.asarray(jax.device_get(node)).astype(dtype)
        for name, layer in zip(leaf.tensor_names(config.num_layers), stored if leaf.stacked else [stored], strict=True):
            tensors[name] = np.ascontiguousarray(layer.T if leaf.transpose else layer)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(hf_config | {"torch_dtype": np.dtype(dtype).name}, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(directory)
