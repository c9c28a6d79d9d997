"""Parses a GGUF file within the bounds of what it holds.

In: a ``.gguf`` file. Out: a `GGUFFile`: its metadata, of the types that they are read as, and views of its tensors.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np

from lora_gen_jax.decoder.families import FAMILIES
from lora_gen_jax.errors import ModelError
from lora_gen_jax.untrusted import check_fields, reason_of


def readable(architecture: str) -> bool:
    """Whether files of this `general.architecture` can be read."""
    return architecture in FAMILIES and FAMILIES[architecture].gguf


_SIZE = Annotated[int, 1, 2**31]
# Metadata that are read, behind the architecture's name or as they are.
_SCHEMA = {
    "block_count": _SIZE,
    "embedding_length": _SIZE,
    "feed_forward_length": _SIZE,
    "context_length": _SIZE,
    "attention.head_count": _SIZE,
    "attention.head_count_kv": _SIZE,
    "attention.key_length": _SIZE,
    "attention.sliding_window": _SIZE,
    "attention.layer_norm_rms_epsilon": Annotated[float, 0, 1],
    "rope.dimension_count": _SIZE,
    "rope.freq_base": Annotated[float, 1, 1e12],
    "rope.scaling.type": str,
    "attn_logit_softcapping": Annotated[float, 1e-6, 1e12],
    "final_logit_softcapping": Annotated[float, 1e-6, 1e12],
    "expert_count": int,
}
_TOKENIZER = {
    "tokenizer.ggml.model": str | None,
    "tokenizer.ggml.pre": str | None,
    "tokenizer.ggml.tokens": list[str] | None,
    "tokenizer.ggml.merges": list[str] | None,
    "tokenizer.ggml.token_type": list[int] | None,
    "tokenizer.ggml.add_bos_token": bool | None,
    "tokenizer.chat_template": str | None,
}


class _Reader(gguf.GGUFReader):
    # Same result as the parent's method without NumPy's slow slicing of memory maps: a vocabulary parses 4x faster.
    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if not 0 <= int(offset) <= int(offset) + int(count) * np.dtype(dtype).itemsize <= len(self.data):
            raise ValueError(f"it names {int(count)} values at byte {int(offset)} of {len(self.data)}")
        if self.byte_order == "S":
            return super()._get(offset, dtype, count, override_order)
        return np.frombuffer(self.data, dtype, int(count), int(offset))

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        # An array becomes Python objects, a hundred times its size, and one of arrays would call this for every level.
        if raw_type == gguf.GGUFValueType.ARRAY:
            kind, count = self._get(orig_offs, np.uint32)[0], int(self._get(orig_offs + 4, np.uint64)[0])
            if kind == gguf.GGUFValueType.ARRAY or count > _LONGEST:
                raise ValueError(f"it holds arrays of arrays, or one of more than {_LONGEST} values")
        return super()._get_field_parts(orig_offs, raw_type)


_LONGEST = 2**21  # values of a metadata array: eight times the largest vocabulary


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A parsed file: `metadata` as plain Python values and `tensors` as views of the memory-mapped data."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value of the file's architecture: `get("block_count")` is `llama.block_count`.

        Raises:
            ModelError: the value is missing and there is no default, differs from layer to layer, or is none that a
                model can have.
        """
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if value is None or isinstance(value, list):
            problem = "lacks" if value is None else "has a separate value for every layer in"
            raise ModelError(
                f"{self.path} {problem} the metadata field {self.architecture}.{key}",
                field=f"{self.path.name}:{name}",
                remedy="use another file",
            )
        check_fields({name: value}, {name: _SCHEMA[key]}, self.path.name, ModelError)
        return value

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family."""
        return str(self.metadata.get("general.architecture", ""))


def open_gguf(path: Path) -> GGUFFile:
    """Parses a file; a file that has not changed is parsed once per process, as its vocabulary takes a while.

    Raises:
        ModelError: the file is missing, truncated or no GGUF file.
    """
    try:
        stat = os.stat(path)
        return _parse(path, stat.st_mtime_ns, stat.st_size)
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist", field=path.name, remedy="give a .gguf file") from error
    except (ValueError, IndexError, KeyError, OverflowError, OSError, TypeError) as error:
        raise ModelError(
            f"{path} is truncated or not a GGUF file ({reason_of(error)})", field=path.name, remedy="download it again"
        ) from error


@functools.lru_cache(maxsize=2)
def _parse(path: Path, _modified: int, _size: int) -> GGUFFile:
    reader = _Reader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    check_fields(metadata, _TOKENIZER, path.name, ModelError)
    file = GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    if readable(file.architecture) and (blocks := file.get("block_count")) > len(file.tensors):
        raise ModelError(
            f"{path}: {file.architecture}.block_count is {blocks}, but the file holds {len(file.tensors)} tensors",
            field=f"{path.name}:{file.architecture}.block_count",
            code="range",
            remedy="download it again",
        )
    return file
