"""A specialisation on disk: the sparse gates of one prompt, a thousand bytes beside a pool that is found again.

In: what the generator said about one prompt. Out: a directory with `specialization.safetensors` (gates and
fingerprints), `prompt.txt` and `specialization.json` (readable). Direct generation has no gates: its factors are
stored in full.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lora_gen_jax.adapters.lora import PromptLoRA
from lora_gen_jax.config import GeneratorConfig
from lora_gen_jax.errors import CheckpointError
from lora_gen_jax.files import complete_directory
from lora_gen_jax.generator.lora_gen import Generated, gated_adapter

TENSORS, PROMPT, READABLE = "specialization.safetensors", "prompt.txt", "specialization.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Specialization:
    """One prompt's specialisation.

    Attributes:
        tensors: {"index": [L, K], "weight": [L, K]}, or {"site.a": [L, inputs, R], "site.b": …} for direct generation.
        fingerprints: of the cloud model, the edge model and the pool.
        prompt: the text that it was generated from.
        checkpoint: where the generator was, when it was made; None for the one that is shipped.
        versions: of the packages it was made with.
    """

    tensors: dict[str, np.ndarray]
    fingerprints: dict[str, str]
    prompt: str
    checkpoint: str | None
    versions: dict[str, str]

    @property
    def direct(self) -> bool:
        return "index" not in self.tensors


def pool_fingerprint(variables: Any) -> str:
    """16 hex digits that identify the expert pool; "none" for direct generation."""
    pool = variables["params"].get("pool")
    if pool is None:
        return "none"
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(pool), key=lambda item: str(item[0])):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}".encode())
        digest.update(np.asarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


def sparse_tensors(generated: Generated, settings: GeneratorConfig) -> dict[str, np.ndarray]:
    """What is stored of a single prompt: its K largest gates per layer, or its factors."""
    if generated.gates_PLE is None:
        factors = generated.adapter.scanned
        return {f"{site}.{name}": np.asarray(x[:, 0]) for site, pair in factors.items() for name, x in pair.items()}
    gates_LE = np.asarray(generated.gates_PLE[0], np.float32)
    index = np.argsort(-gates_LE, axis=1, kind="stable")[:, : settings.active_experts]
    weight = np.take_along_axis(gates_LE, index, axis=1)
    return {"index": index.astype(np.uint8 if gates_LE.shape[1] <= 256 else np.uint16), "weight": weight}


def adapter_of(specialization: Specialization, variables: Any, settings: GeneratorConfig) -> Any:
    """The adapter of one prompt, from a specialisation and the generator that has its pool.

    Raises:
        CheckpointError: when the pool is another one than that the gates were made for.
    """
    if specialization.direct:
        factors: dict[str, dict[str, jax.Array]] = {}
        for name, value in specialization.tensors.items():
            site, factor = name.split(".")
            factors.setdefault(site, {})[factor] = jnp.asarray(value)[:, None]
        return PromptLoRA(factors, scale=settings.alpha / settings.rank)
    found, expected = pool_fingerprint(variables), specialization.fingerprints["pool"]
    if found != expected:
        raise CheckpointError(
            f"the specialisation was made with another expert pool (fingerprint {expected}, this generator's pool is"
            f" {found}): give the checkpoint that it was made with (--checkpoint)"
        )
    index, weight = specialization.tensors["index"].astype(np.int64), specialization.tensors["weight"]
    gates_LE = np.zeros((index.shape[0], settings.num_experts), np.float32)
    np.put_along_axis(gates_LE, index, weight, axis=1)
    flat = variables["params"]["pool"]
    sites = sorted({name.rsplit("_", 1)[0] for name in flat})
    pool = {site: {"a": flat[f"{site}_a"], "b": flat[f"{site}_b"]} for site in sites}
    return gated_adapter(jnp.asarray(gates_LE)[None], pool, settings)


def save_specialization(specialization: Specialization, directory: Path) -> None:
    """Writes the directory, complete or not at all.

    Raises:
        OutputError: when it exists and is not empty, or cannot be written.
    """
    s = specialization
    digest = hashlib.sha256(s.prompt.encode()).hexdigest()[:16]
    metadata = {**s.fingerprints, "prompt": digest, "versions": " ".join(f"{k}={v}" for k, v in s.versions.items())}
    readable: dict[str, Any] = {
        "fingerprints": s.fingerprints,
        "prompt_sha256": digest,
        "checkpoint": s.checkpoint,
        "versions": s.versions,
    }
    if not s.direct:
        pairs = zip(s.tensors["index"], s.tensors["weight"], strict=True)
        readable["gates"] = [
            {str(int(e)): round(float(w), 6) for e, w in zip(index, weight, strict=True)} for index, weight in pairs
        ]
    with complete_directory(directory) as temporary:
        tensors = {name: np.ascontiguousarray(value) for name, value in s.tensors.items()}
        (temporary / TENSORS).write_bytes(safetensors.numpy.save(tensors, metadata))
        (temporary / PROMPT).write_bytes(s.prompt.encode())
        (temporary / READABLE).write_text(json.dumps(readable, indent=2) + "\n", encoding="utf-8")


def load_specialization(directory: Path) -> Specialization:
    """Reads a specialisation directory.

    Raises:
        CheckpointError: when it is none, or damaged.
    """
    if not (directory / TENSORS).is_file():
        raise CheckpointError(f"{directory} is no specialisation (no {TENSORS}): make one with `lora-gen specialize`")
    try:
        with safetensors.safe_open(directory / TENSORS, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        readable = json.loads((directory / READABLE).read_text(encoding="utf-8"))
        return Specialization(
            tensors=tensors,
            fingerprints={name: metadata[name] for name in ("cloud", "edge", "pool")},
            # Bytes: read as text, a carriage return would become a line feed.
            prompt=(directory / PROMPT).read_bytes().decode(),
            checkpoint=readable["checkpoint"],
            versions=readable["versions"],
        )
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"specialisation {directory} is damaged: {error}") from error
