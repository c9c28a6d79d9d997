"""Reads a GGUF file (llama.cpp's format), quantized or not.

In: a ``.gguf`` file of architecture llama, qwen2, gemma or gemma2. Out: a Hugging Face style config dictionary, and a
`GGUFCheckpoint` that gives the tensors under their Hugging Face names, dequantized and with llama.cpp's changes
undone: rows of q and k permuted for interleaved rotary embeddings (llama), norms stored as w + 1 (gemma, gemma2).
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lora_gen_jax.decoder.families import FAMILIES
from lora_gen_jax.decoder.pretrained.assembly import Index
from lora_gen_jax.decoder.pretrained.gguf_file import GGUFFile, open_gguf, readable
from lora_gen_jax.errors import ModelError


def read_gguf_config(path: Path) -> dict[str, Any]:
    """The dictionary that ``config.json`` of the same model would hold.

    Raises:
        ModelError: an architecture or rotary scaling that is not supported, or missing metadata.
    """
    file = open_gguf(path)
    family = file.architecture
    if not readable(family):
        raise ModelError(
            f"{path}: architecture {family!r} is not supported",
            field=f"{path.name}:general.architecture",
            remedy=f"use one of {', '.join(filter(readable, FAMILIES))}",
        )
    if file.get("expert_count", 0):
        raise ModelError(
            f"{path} is a mixture of experts, which is not supported",
            field=f"{path.name}:{family}.expert_count",
            remedy="use a dense model",
        )
    width, heads = file.get("embedding_length"), file.get("attention.head_count")
    head_dim = file.get("attention.key_length", max(1, width // heads))
    if (rotated := file.get("rope.dimension_count", head_dim)) != head_dim:
        raise ModelError(
            f"{path}: rope.dimension_count is {rotated} of {head_dim} in a head, but only heads that are rotated whole"
            " are supported",
            field=f"{path.name}:{family}.rope.dimension_count",
            remedy="use another model",
        )
    special = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")}
    config = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": int((_shape(_tensor(file, "token_embd.weight")) or (0,))[0]),
        "hidden_size": width,
        "intermediate_size": file.get("feed_forward_length"),
        "num_hidden_layers": file.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.get("context_length"),
        "rms_norm_eps": _float32(file.get("attention.layer_norm_rms_epsilon")),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": _float32(file.get("rope.freq_base", 10_000.0)),
        **{key: value for key, value in special.items() if value is not None},
        **_rope_scaling(file),
    }

    def get(key: str, default: Any) -> Any:
        return _float32(value) if isinstance(value := file.get(key, default), float) else value

    return config | FAMILIES[family].gguf_fields(get, config)


class GGUFCheckpoint:
    """The tensors of a GGUF file by their Hugging Face names, as float32; implements `Checkpoint`.

    Raises:
        ModelError: the file is missing, truncated or no GGUF file.
    """

    def __init__(self, path: Path):
        self.description = str(path)
        self._file = open_gguf(path)
        family = FAMILIES[self._file.architecture]
        architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        # One block more than there is, so that a superfluous layer can be noticed.
        self._names = gguf.get_tensor_name_map(architectures[family.model_type], self._file.get("block_count") + 1)
        self._norm_offset = family.gguf_norm_offset
        self._permuted_heads = {}
        if family.gguf_permuted:
            heads = self._file.get("attention.head_count")
            self._permuted_heads = {"q_proj": heads, "k_proj": self._file.get("attention.head_count_kv", heads)}

    def __contains__(self, name: str) -> bool:
        """Whether the file holds this tensor."""
        return self._stored_name(name) in self._file.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as PyTorch sees it: [outputs, inputs] for a linear layer."""
        return _shape(self._tensor(name))

    def read(self, name: str, index: Index) -> np.ndarray:
        """tensor[index] as float32; only these rows are read and dequantized."""
        tensor = self._tensor(name)
        rows = _rope_rows(len(tensor.data), self._permuted_heads.get(name.split(".")[-2]))
        # Quantization blocks run along rows, so rows can be picked before dequantizing.
        stored = tensor.data[index[0] if rows is None else rows[index[0]]]
        try:
            values = gguf.dequantize(stored, tensor.tensor_type).astype(np.float32, copy=False)
        except (NotImplementedError, ValueError) as error:
            raise ModelError(
                f"{self.description}: tensor {name!r} is stored as {tensor.tensor_type.name}, which cannot be read",
                field=name,
                remedy="use another file",
            ) from error
        if name.endswith("norm.weight"):
            values = values - np.float32(self._norm_offset)
        return values[(slice(None), *index[1:])]

    def stored_dtype(self, name: str) -> str:
        """The quantization format, as Q4_1."""
        return self._tensor(name).tensor_type.name

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as stored: quantized, in the order of the file."""
        return self._tensor(name).data[start:stop]

    def _stored_name(self, name: str) -> str | None:
        return self._names.get_name(name, try_suffixes=(".weight", ".bias"))

    def _tensor(self, name: str) -> gguf.ReaderTensor:
        return _tensor(self._file, self._stored_name(name) or name)


def _tensor(file: GGUFFile, name: str) -> gguf.ReaderTensor:
    if name not in file.tensors:
        raise ModelError(
            f"{file.path}: tensor {name!r} is missing",
            field=f"{file.path.name}:{name}",
            remedy="download the file again",
        )
    return file.tensors[name]


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _rope_rows(rows: int, heads: int | None) -> np.ndarray | None:
    """Row of the file that holds each Hugging Face row: the file interleaves the two halves of every head."""
    if heads is None:
        return None
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def _float32(value: float) -> float:
    """The shortest decimal that is the same float32: the file's 9.9999997e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GGUFFile) -> dict[str, Any]:
    """`rope_scaling` of the config, recovered from the frequency factors that llama.cpp stores for Llama 3."""
    kind = file.get("rope.scaling.type", "none")
    if kind != "none":
        raise ModelError(
            f"{file.path}: rotary scaling {kind!r} is not supported",
            field=f"{file.path.name}:rope.scaling.type",
            remedy="use a Hugging Face directory",
        )
    if "rope_freqs.weight" not in file.tensors or not file.tensors["rope_freqs.weight"].data.size:
        return {}
    stored = np.asarray(file.tensors["rope_freqs.weight"].data, np.float32)
    # The factors leave low, high and original length open up to a common factor; all Llama 3 models use these.
    scaling = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_factors(scaling, file.get("rope.freq_base", 10_000.0), stored.size)
    if not np.allclose(stored, expected, rtol=1e-4):
        raise ModelError(
            f"{file.path}: its rotary frequency factors are not Llama 3's",
            field=f"{file.path.name}:rope_freqs.weight",
            remedy="use a Hugging Face directory",
        )
    return {"rope_scaling": scaling}


def _llama3_factors(scaling: dict[str, Any], theta: float, size: int) -> np.ndarray:
    wavelengths = 2 * np.pi * theta ** (np.arange(size) / size)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
