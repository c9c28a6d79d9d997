"""Reads a Hugging Face model directory.

In: a directory with ``config.json`` and ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.
Out: the config dictionary, and an `HFCheckpoint` that reads slices of tensors from the memory-mapped shards.
"""

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then returns)
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_gen_jax.decoder.pretrained.assembly import Index
from lora_gen_jax.errors import ModelError
from lora_gen_jax.untrusted import fits, read_object

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


def read_hf_config(directory: Path) -> dict[str, Any]:
    """The dictionary of a directory's ``config.json``.

    Raises:
        ModelError: the file is missing or is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist", field=path.name, remedy="give a directory saved by transformers (save_pretrained)"
        )
    return read_object(path, ModelError, "download it again")


class HFCheckpoint:
    """The tensors of a directory, by name; nothing is read before it is asked for.

    Names are those of a causal language model (`model.layers.0…`, OPT: `model.decoder.layers.0…`). Checkpoints of
    the bare base model, whose names lack the leading `model.`, are accepted as well.

    Raises:
        ModelError: no weights, a shard is missing, or a file is truncated or not in safetensors format.
    """

    def __init__(self, directory: Path):
        self.description = str(directory)
        self._shard_of: dict[str, Path] = {}
        self._kind_of: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in _shards(directory):
            with _open(path) as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                    self._shard_of[name] = path
                    stored = shard.get_slice(name)
                    self._kind_of[name] = (tuple(stored.get_shape()), stored.get_dtype())

    def __contains__(self, name: str) -> bool:
        """Whether a shard holds this tensor, under this name or without `model.`."""
        return self._stored_name(name) in self._shard_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored: [outputs, inputs] for a linear layer."""
        return self._kind_of[self._stored_name(name)][0]

    def read(self, name: str, index: Index) -> np.ndarray:
        """tensor[index] in its stored dtype; reads only that part of the file.

        Raises:
            ModelError: the tensor is not stored as floating-point numbers (a quantized checkpoint).
        """
        if self.stored_dtype(name) not in _FLOATS:
            raise ModelError(
                f"{self.description}: tensor {name!r} is stored as {self.stored_dtype(name)}; only"
                f" {', '.join(_FLOATS)} are supported",
                field=name,
                remedy="Use an unquantized checkpoint",
            )
        return self._read(name, index)

    def stored_dtype(self, name: str) -> str:
        """The dtype's name in safetensors, as BF16."""
        return self._kind_of[self._stored_name(name)][1]

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as stored."""
        return self._read(name, slice(start, stop))

    def _stored_name(self, name: str) -> str:
        return name if name in self._shard_of else name.removeprefix("model.")

    def _read(self, name: str, index: Any) -> np.ndarray:
        stored = self._stored_name(name)
        # Opened anew for every part: the pages of a mapping that stays open would count as this process's memory.
        with _open(self._shard_of[stored]) as shard:
            return shard.get_slice(stored)[index]


def _shards(directory: Path) -> list[Path]:
    single, index = directory / _SINGLE, directory / _INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        remedy = "give a directory saved by transformers (save_pretrained)"
        if any(directory.glob("pytorch_model*.bin")):
            remedy = "it has PyTorch weights only: load them in transformers and save them with save_pretrained"
        raise ModelError(f"{directory} has neither {_SINGLE} nor {_INDEX}", field=_SINGLE, remedy=remedy)
    weight_map = read_object(index, ModelError, "download it again").get("weight_map")
    if not fits(weight_map, dict[str, str]) or not weight_map or any(Path(x).name != x for x in weight_map.values()):
        raise ModelError(
            f"{index} has no weight_map of tensors to files beside it",
            field=f"{index.name}:weight_map",
            remedy="download the checkpoint again",
        )
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.is_file():
            raise ModelError(
                f"{index} names the shard {shard.name}, which is missing",
                field=shard.name,
                remedy="download the checkpoint again",
            )
    return shards


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is truncated or not a safetensors file ({error})", field=path.name, remedy="download it again"
        ) from error
