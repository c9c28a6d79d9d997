"""How much host memory loading a model's weights takes, beside the weights themselves.

Writes random bfloat16 weights of a model's shape as safetensors shards, loads them in a fresh process through
`lora_gen_jax.load_params`, and prints the peaks. The files are mapped into memory: pages of a mapping are the kernel's
to drop, so they are told apart from the process's own memory, which is what has to fit.

Command:  python benchmarks/loading_memory.py [--model NAME] [--weights int8] [--directory DIR]
Needs as much disk as the weights in bfloat16 (16 GB for Llama-3-8B), and 1.15 times as much memory as what is loaded.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import tyro

from lora_gen_jax.decoder.quantized import FORMATS

SHARD_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is loaded, and from where."""

    model: str = "meta-llama/Meta-Llama-3-8B-Instruct"
    """A model whose shape is known (`lora_gen_jax.decoder.pretrained.shapes`), or a directory with a config.json."""
    weights: Literal["bfloat16", "int8", "nf4"] = "bfloat16"
    """What the layers' matrices are loaded as."""
    directory: Path | None = None
    """Keep the shards here, or load those that are here already; left out, a temporary directory."""
    load_only: bool = False
    """Load `directory` in this process and print one line of JSON (what the fresh process runs)."""


def main(flags: Flags) -> None:
    if flags.load_only:
        assert flags.directory is not None
        print(json.dumps(load(flags.directory, flags.weights)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = flags.directory or Path(temporary)
        if not (directory / "model.safetensors.index.json").exists():
            write(flags.model, directory)
        command = [sys.executable, __file__, "--load-only", "--directory", str(directory), "--weights", flags.weights]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = found["weights"]
    print(f"weights        {size / 1e9:7.2f} GB, layers in {flags.weights}")
    print(
        f"own memory     {found['own_peak'] / 1e9:7.2f} GB at its peak, {found['own_peak'] / size:.3f} of the weights"
    )
    print(f"  before       {found['own_before'] / 1e9:7.2f} GB (the interpreter and its libraries)")
    print(f"with mappings  {found['resident_peak'] / 1e9:7.2f} GB at its peak (pages of the files included)")
    print(f"time           {found['seconds']:7.1f} s")


def write(model: str, directory: Path) -> None:
    """Random weights in the model's shapes, in shards of about `SHARD_BYTES`, under their Hugging Face names."""
    from safetensors.numpy import save_file

    from lora_gen_jax.decoder.config import DecoderConfig
    from lora_gen_jax.decoder.pretrained import leaves, load_hf_config
    from lora_gen_jax.decoder.pretrained.shapes import KNOWN_SHAPES

    directory.mkdir(parents=True, exist_ok=True)
    hf = KNOWN_SHAPES.get(model) or load_hf_config(model)
    config, rng = DecoderConfig.from_hf(hf), np.random.default_rng(0)
    shards: list[dict[str, np.ndarray]] = [{}]
    weight_map: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], directory / name)
        weight_map.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for leaf in leaves(config):
        for name in leaf.tensor_names(config.num_layers):
            noise = rng.standard_normal(leaf.stored_shape, np.float32)
            shards[-1][name] = noise.astype(ml_dtypes.bfloat16)
            if sum(x.nbytes for x in shards[-1].values()) >= SHARD_BYTES:
                flush()
                shards.append({})
    flush()
    (directory / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def load(directory: Path, stored: str) -> dict[str, float]:
    """Loads the weights and returns peaks in bytes, sampled every few milliseconds."""
    import jax
    import jax.numpy as jnp

    from lora_gen_jax import load_params

    jnp.zeros(1).block_until_ready()
    peaks, done = memory(), threading.Event()
    before = peaks

    def sample() -> None:
        nonlocal peaks
        while not done.wait(0.005):
            peaks = tuple(map(max, peaks, memory()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.perf_counter()
    quantized = stored if stored in FORMATS else None
    params = jax.block_until_ready(load_params(str(directory), dtype=jnp.bfloat16, weights=quantized))
    seconds = time.perf_counter() - began
    done.set()
    sampler.join()
    # JAX counts a byte for an element of four bits, of which two are stored in one.
    weights = sum(x.nbytes // (2 if x.dtype == jnp.uint4 else 1) for x in jax.tree.leaves(params))
    own, resident = peaks
    return {"weights": weights, "own_before": before[0], "own_peak": own, "resident_peak": resident, "seconds": seconds}


def memory() -> tuple[int, int]:
    """(anonymous, resident) bytes of this process."""
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmRSS"):
            found[name] = int(value.split()[0]) * 1024
    return found["RssAnon"], found["VmRSS"]


if __name__ == "__main__":
    main(tyro.cli(Flags))
