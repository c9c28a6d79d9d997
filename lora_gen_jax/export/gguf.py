"""A specialization as a LoRA adapter of llama.cpp.

In: the factors of an adapter. Out: ``adapter.gguf``, with `blk.N.ffn_up.weight.lora_a` [X, inputs] and `.lora_b`
[outputs, X] as PyTorch sees them, and so on for each FFN site: what llama.cpp's convert_lora_to_gguf.py writes.
"""

from pathlib import Path

import gguf
import numpy as np

from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.pretrained.save import cast
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.export.factors import ExportedAdapter
from lora_gen_jax.export.formats import Format

FILE = "adapter.gguf"
_ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
}


def check_gguf(config: DecoderConfig) -> None:
    """llama.cpp must know the family.

    Raises:
        ConfigError: when it does not.
    """
    if config.family not in _ARCHITECTURES:
        raise ConfigError(
            f"format gguf: llama.cpp has no architecture for {config.family} models",
            field="--format",
            remedy="use --format peft or merged",
        )


def write_gguf(adapter: ExportedAdapter, directory: Path, dtype: str) -> None:
    """Writes the adapter into `directory`, which exists.

    llama.cpp multiplies by α/r and takes r from the tensors: α is the rank.

    Raises:
        ConfigError: for a family that llama.cpp lacks, or a factor beyond the dtype's range.
    """
    check_gguf(adapter.config)
    family = adapter.config.family
    names = gguf.get_tensor_name_map(_ARCHITECTURES[family], adapter.config.num_layers)
    writer = gguf.GGUFWriter(directory / FILE, family)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    writer.add_name(f"LoRA-Gen specialization of {adapter.source}")
    writer.add_description("; ".join(f"{name}: {value}" for name, value in adapter.origin.items()))
    writer.add_file_type(_FILE_TYPES[dtype])
    for name, a, b in adapter.modules():
        stored = names.get_name(name)
        assert stored is not None, name
        for letter, values in (("a", a), ("b", b)):
            _add(writer, f"{stored}.weight.lora_{letter}", values, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, dtype: str) -> None:
    if dtype == "bfloat16":  # no type of NumPy's own: gguf takes its bytes
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quantize(cast(values, np.float32, name), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, cast(values, np.dtype(dtype), name))


FORMAT = Format("llama.cpp adapter", write_gguf, lambda out: f"llama-cli -m EDGE.gguf --lora {out / FILE}", check_gguf)
