"""Builds the parameter tree of a decoder from the tensors of a checkpoint, one leaf at a time.

In: a `DecoderConfig` and a `Checkpoint` (Hugging Face or GGUF). Out: nested dicts of jax arrays, layers stacked on a
leading axis. Tensors are read in row blocks straight into the target dtype or format, and a sharded leaf is read one
shard at a time, any other one layer at a time, so that host memory never holds two copies of a large leaf.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.pretrained.layout import Leaf, leaves
from lora_gen_jax.decoder.quantized import FORMATS, codes_of, scales_of
from lora_gen_jax.errors import ModelError
from lora_gen_jax.untrusted import finite

_BLOCK_ELEMENTS = 1 << 22  # read at once: bounds the temporaries of casting and dequantizing
Index = tuple[slice, ...]


class Checkpoint(Protocol):
    """Tensors of a model by their Hugging Face names, in PyTorch's axis order."""

    description: str  # the file or directory, for error messages

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint holds this tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as PyTorch sees it."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """The values of tensor[index] in a floating dtype; one slice per axis."""
        ...

    def stored_dtype(self, name: str) -> str:
        """Name of the format the tensor is stored in."""
        ...

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as stored: any dtype, quantized blocks included."""
        ...


def assemble(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    dtype: Any,
    shardings: Any = None,
    matrices: Any = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Reads all parameters.

    Args:
        config: of the decoder.
        checkpoint: where the tensors are.
        dtype: of the parameters.
        shardings: None, one `jax.sharding.Sharding`, or the tree of the parameters with a sharding (or None, for the
            default device) at every leaf or in place of a subtree.
        matrices: of kernels and embedding tables, where it is another than `dtype`.
        weights: the format that the layers' kernels are quantized to; None for none.

    Returns:
        Nested dicts of jax arrays: kernels [L, inputs, outputs], norms [L, D], embedding [V, D]; "scales" beside
        quantized kernels.

    Raises:
        ModelError: a tensor is missing or its shape does not fit the config.
    """
    table = list(leaves(config))
    check(config, checkpoint, table)
    params: dict[str, Any] = {}
    for leaf in table:
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        source = _Stacked(checkpoint, leaf, config.num_layers)
        if weights is not None and leaf.stacked and leaf.path[-1] == "kernel":
            node |= _quantized(source, weights, shardings)
            continue
        matrix = matrices is not None and leaf.path[-1] in ("kernel", "embedding")
        stored = np.dtype(matrices if matrix else dtype)
        sharding = _sharding_of(shardings, leaf.path)
        node[leaf.path[-1]] = _placed(source.shape, stored, leaf.stacked, partial(source.read, dtype=stored), sharding)
    return params


def check(config: DecoderConfig, checkpoint: Checkpoint, table: list[Leaf]) -> None:
    """Compares names and shapes with the config before anything is read.

    Raises:
        ModelError: a tensor is missing or of another shape, or there are more layers than the config says.
    """
    for leaf in table:
        # The last layer first: a config may ask for a billion layers, whose names alone would fill the memory.
        last = leaf.name.format(layer=config.num_layers - 1)
        for name in leaf.tensor_names(config.num_layers) if last in checkpoint else [last]:
            if name not in checkpoint:
                hint = "; set tie_word_embeddings if the model has none" if name == "lm_head.weight" else ""
                raise ModelError(
                    f"{checkpoint.description}: tensor {name!r} is missing, which a {config.family} model with this"
                    f" config needs{hint}",
                    field=name,
                    remedy="Download the checkpoint again or correct its config",
                )
            if checkpoint.shape(name) != leaf.stored_shape:
                raise ModelError(
                    f"{checkpoint.description}: tensor {name!r} has shape {checkpoint.shape(name)}, its config asks"
                    f" for {leaf.stored_shape}",
                    field=name,
                    remedy="Use the config that belongs to these weights",
                )
        if leaf.stacked and leaf.name.format(layer=config.num_layers) in checkpoint:
            raise ModelError(
                f"{checkpoint.description}: it holds more layers than the {config.num_layers} of its config"
                f" ({leaf.name.format(layer=config.num_layers)!r} exists)",
                field="config.json:num_hidden_layers",
                remedy="Use the config that belongs to these weights",
            )


def _sharding_of(shardings: Any, path: tuple[str, ...]) -> jax.sharding.Sharding | None:
    node = shardings
    for key in path:
        if not isinstance(node, Mapping):
            break
        if key not in node:
            raise ModelError(
                f"shardings has no entry {'/'.join(path)}",
                field="shardings",
                remedy="give it the tree of the parameters",
            )
        node = node[key]
    return node


@dataclasses.dataclass(frozen=True)
class _Stacked:
    """One leaf's tensors in a checkpoint, read as parts of the leaf."""

    checkpoint: Checkpoint
    leaf: Leaf
    layers: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.full_shape(self.layers)

    def read(self, bounds: Index, dtype: Any, convert: "_Convert | None" = None) -> np.ndarray:
        """leaf[bounds] in `dtype`; `convert` makes it of a layer's rows, as `_fill` says."""
        out = np.empty([b.stop - b.start for b in bounds], dtype)
        names = self.leaf.tensor_names(self.layers)
        if not self.leaf.stacked:
            _fill(out, self.checkpoint, names[0], bounds, self.leaf.transpose)
        else:
            for layer in range(bounds[0].start, bounds[0].stop):
                rows = None if convert is None else partial(convert, layer)
                target = out[layer - bounds[0].start]
                _fill(target, self.checkpoint, names[layer], bounds[1:], self.leaf.transpose, rows)
        return out


_Convert = Callable[[int, np.ndarray, slice], np.ndarray]


def _quantized(source: _Stacked, weights: str, shardings: Any) -> dict[str, jax.Array]:
    """A kernel's codes and scales. The file is read twice: a shard's scales may need inputs that it has none of."""
    format, (layers, inputs, outputs) = FORMATS[weights], source.shape
    block = format.block_of(inputs)
    scales_LNO = np.empty((layers, inputs // block, outputs), format.scales)
    for layer, name in enumerate(source.leaf.tensor_names(layers)):
        everything = (slice(0, inputs), slice(0, outputs))

        def scales(rows_OI: np.ndarray, _: slice) -> np.ndarray:
            return scales_of(rows_OI.astype(np.float32).T, format, np).T

        _fill(scales_LNO[layer], source.checkpoint, name, everything, True, scales)

    def codes(bounds: Index) -> np.ndarray:
        blocks = np.arange(bounds[1].start, bounds[1].stop) // block

        def convert(layer: int, rows_OI: np.ndarray, rows: slice) -> np.ndarray:
            return codes_of(rows_OI.astype(np.float32).T, scales_LNO[layer, :, rows][blocks], format, np).T

        return source.read(bounds, format.codes, convert)

    def on(name: str) -> jax.sharding.Sharding | None:
        return _sharding_of(shardings, (*source.leaf.path[:-1], name))

    return {
        "kernel": _placed(source.shape, np.dtype(format.codes), True, codes, on("kernel")),
        "scales": _placed(scales_LNO.shape, scales_LNO.dtype, True, lambda bounds: scales_LNO[bounds], on("scales")),
    }


def _placed(
    shape: tuple[int, ...],
    dtype: np.dtype,
    stacked: bool,
    part: Callable[[Index], np.ndarray],
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """The array whose parts `part` reads, by slices with a start and a stop."""

    def bounded(index: Index | None) -> Index:
        index = index or (slice(None),) * len(shape)
        return tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))

    if sharding is None or len(sharding.device_set) == 1:
        whole = _layer_by_layer(shape, dtype, lambda index: part(bounded(index))) if stacked else part(bounded(None))
        return jax.device_put(whole, sharding)
    read: dict[Any, np.ndarray] = {}

    def once(index: Index | None) -> np.ndarray:
        # Devices that hold copies ask for the same part.
        bounds = bounded(index)
        key = tuple((s.start, s.stop) for s in bounds)
        if key not in read:
            read[key] = part(bounds)
        return read[key]

    return jax.make_array_from_callback(shape, sharding, once, dtype=dtype)


def _layer_by_layer(shape: tuple[int, ...], dtype: np.dtype, part: Callable[[Index], np.ndarray]) -> jax.Array:
    # A leaf of an 8B model is a quarter of its weights: handed over whole, it would exist twice.
    whole = jnp.zeros(shape, dtype)
    rest = (slice(None),) * (len(shape) - 1)
    for layer in range(shape[0]):
        whole = _set_layer(whole, part((slice(layer, layer + 1), *rest)), layer)
    return whole


@partial(jax.jit, donate_argnums=0)
def _set_layer(whole: jax.Array, new: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, new, layer, axis=0)


def _fill(
    out: np.ndarray,
    checkpoint: Checkpoint,
    name: str,
    index: Index,
    transpose: bool,
    convert: Callable[[np.ndarray, slice], np.ndarray] | None = None,
) -> None:
    """Writes tensor[index] into `out`, block by block of the stored rows; `convert` makes of a block what is written.

    `index` has the axes of `out`, which `transpose` turns into those that are stored.
    """
    # Assigning into a (transposed) view casts, transposes and copies in one pass.
    target, index = (out.T, index[::-1]) if transpose else (out, index)
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(s.stop - s.start for s in index[1:])))
    first, last = index[0].start, index[0].stop
    for start in range(first, last, step):
        stop = min(start + step, last)
        block = checkpoint.read(name, (slice(start, stop), *index[1:]))
        target[start - first : stop - first] = block if convert is None else convert(block, slice(start, stop))
        if not finite(block):
            raise ModelError(
                f"{checkpoint.description}: tensor {name!r} holds values that are not numbers",
                field=name,
                code="not finite",
                remedy="download it again",
            )
