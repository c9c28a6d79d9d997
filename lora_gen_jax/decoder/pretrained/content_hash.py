"""Identifies the weights of a model by their content.

In: a `DecoderConfig` and a `Checkpoint`. Out: 16 hex digits. They depend on what is stored, not on how it is loaded
(dtype, sharding, one file or many), so a specialization made from one copy of a model is known to fit another.
"""

import dataclasses
import hashlib
import json

from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.pretrained.assembly import Checkpoint, check
from lora_gen_jax.decoder.pretrained.layout import leaves

_WINDOWS, _WINDOW_BYTES = 8, 1 << 16


def fingerprint_of(config: DecoderConfig, checkpoint: Checkpoint) -> str:
    """First 16 hex digits of a SHA-256 over the config and every tensor's name, shape, format and sampled bytes.

    Tensors of up to 512 KiB enter whole; of larger ones eight evenly spaced windows of 64 KiB do, the first and the
    last rows among them. Any fine-tuning that touches a matrix as a whole changes it; an edit of a few rows of a
    large embedding between the windows does not.

    Raises:
        ModelError: a tensor is missing or does not fit the config.
    """
    table = list(leaves(config))
    check(config, checkpoint, table)
    digest = hashlib.sha256(_config_text(config).encode())
    names = [name for leaf in table for name in leaf.tensor_names(config.num_layers)]
    for name in sorted(names):
        shape = checkpoint.shape(name)
        digest.update(f"\n{name} {shape} {checkpoint.stored_dtype(name)}\n".encode())
        row_bytes = checkpoint.stored_rows(name, 0, 1).nbytes
        for start, stop in _windows(shape[0], row_bytes):
            digest.update(checkpoint.stored_rows(name, start, stop).tobytes())
    return digest.hexdigest()[:16]


def _config_text(config: DecoderConfig) -> str:
    # Fields at their defaults are left out: a later version of the package may add fields.
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return json.dumps({k: v for k, v in sorted(dataclasses.asdict(config).items()) if v != defaults[k]})


def _windows(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    size = max(1, _WINDOW_BYTES // row_bytes)
    if rows <= size * _WINDOWS:
        return [(0, rows)]
    starts = [i * (rows - size) // (_WINDOWS - 1) for i in range(_WINDOWS)]
    return [(start, start + size) for start in starts]
