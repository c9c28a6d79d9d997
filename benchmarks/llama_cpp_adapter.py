"""llama.cpp with an exported adapter against our merged model: logits and greedy tokens of a few texts.

In: a specialization of an edge model that is a GGUF file. The file's weights are dequantized to F32 first, as
llama.cpp rounds activations beside quantized ones, and its keys and values are kept in F32. Out: a line per text.

    pip install llama-cpp-python
    python benchmarks/llama_cpp_adapter.py --specialization DIR [--checkpoint DIR] [--dtype float16]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from llama_cpp import Llama  # pyright: ignore[reportMissingImports] (no dependency)

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.adapters.specialization_fit import adapter_of
from lora_gen_jax.config import ModelConfig
from lora_gen_jax.decoder.pretrained import resolve
from lora_gen_jax.export.command import Export, export_command
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.models import load_model
from lora_gen_jax.specializer import read_specialization

_F32 = int(gguf.GGMLQuantizationType.F32)
TEXTS = (
    "Question: What is the capital of France?\nAnswer:",
    "Once upon a time there was",
    "The three primary colours are",
)


def dequantized(source: Path, target: Path) -> Path:
    """The same GGUF file with all tensors in F32."""
    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        value = int(gguf.LlamaFileType.ALL_F32) if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def read_by_llama_cpp(model: Any, ids: list[int], new_tokens: int) -> tuple[np.ndarray, list[int]]:
    """Logits [T, V] of a text and the greedy tokens that follow it."""
    model.reset()
    model.eval(ids)
    logits_TV = np.array(model.scores[: len(ids)])
    tokens, scores_V = [], logits_TV[-1]
    for _ in range(new_tokens):
        tokens.append(int(scores_V.argmax()))
        model.eval(tokens[-1:])
        scores_V = np.array(model.scores[model.n_tokens - 1])
    return logits_TV, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specialization", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the adapter")
    parser.add_argument("--new-tokens", type=int, default=40)
    args = parser.parse_args()
    special, loaded, config = read_specialization(args.specialization, args.checkpoint, None)
    source = resolve(config.edge.source)
    if source.kind != "gguf":
        parser.error(f"the edge model {config.edge.source} is no GGUF file")
    model = load_model(ModelConfig(config.edge.source, dtype="float32"))
    params = merge(model.params, adapter_of(special, loaded.variables, config.generator, model.config.num_layers))
    with tempfile.TemporaryDirectory() as temporary:
        base, out = dequantized(source.model, Path(temporary, "base.gguf")), Path(temporary, "adapter")
        export_command(Export("gguf", out, args.specialization, args.checkpoint, dtype=args.dtype))
        options = {"n_ctx": 512, "n_batch": 512, "logits_all": True, "verbose": False}
        options |= {"type_k": _F32, "type_v": _F32, "flash_attn": False}
        theirs = Llama(str(base), lora_path=str(out / "adapter.gguf"), **options)
        plain = Llama(str(base), **options)
        for text in TEXTS:
            ids = model.encoder.text(text)
            hidden, _ = model.decoder.apply({"params": params}, jnp.asarray([ids], jnp.int32))
            ours: Any = model.decoder.apply({"params": params}, hidden, method="logits")
            (answer,) = generate(
                EdgeModel(model.decoder, params), [ids], GenerationSettings(max_new_tokens=args.new_tokens, stop_ids=[])
            )
            logits_TV, tokens = read_by_llama_cpp(theirs, ids, args.new_tokens)
            without_TV, _ = read_by_llama_cpp(plain, ids, 0)
            same = next((i for i, pair in enumerate(zip(tokens, answer.ids, strict=True)) if pair[0] != pair[1]), None)
            print(
                f"{text!r}: largest difference of a logit {np.abs(logits_TV - jax.device_get(ours)[0]).max():.1e}"
                f" (without the adapter {np.abs(without_TV - jax.device_get(ours)[0]).max():.1e}),"
                f" {args.new_tokens if same is None else same} of {args.new_tokens} greedy tokens the same"
            )


if __name__ == "__main__":
    main()
