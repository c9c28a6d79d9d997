"""A specialisation on disk: the sparse gates of one prompt, a thousand bytes beside a pool that is found again.

In: what the generator said about one prompt. Out: a directory with `specialization.safetensors` (gates and
fingerprints), `prompt.txt` and `specialization.json` (readable). Direct generation has no gates: its factors are
stored in full.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lora_gen_jax.adapters.lora import PromptLoRA
from lora_gen_jax.adapters.specialization_check import check_size, read_readable, read_tensors
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

    @property
    def digest(self) -> str:
        """16 hex digits that identify the prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]

    def gates(self, num_experts: int) -> np.ndarray:
        """The gates of all experts, [L, E] in fp32; zero where an expert is not chosen.

        Raises:
            CheckpointError: for direct generation, which has none, or a gate of an expert that is not there.
        """
        if self.direct:
            raise CheckpointError("this specialisation has no gates: its generator makes the factors directly")
        index, weight = self.tensors["index"].astype(np.int64), self.tensors["weight"]
        if index.shape[1] > num_experts or index.max() >= num_experts:
            raise CheckpointError(
                f"the specialisation has {index.shape[1]} gates a layer, up to that of expert {index.max()}, but the"
                f" pool has {num_experts} experts: give the checkpoint that it was made with (--checkpoint)"
            )
        gates_LE = np.zeros((len(index), num_experts), np.float32)
        np.put_along_axis(gates_LE, index, weight.astype(np.float32), axis=1)
        return gates_LE


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


def sparse_tensors(generated: Generated, settings: GeneratorConfig, prompt: int = 0) -> dict[str, np.ndarray]:
    """What is stored of one of the prompts: its K largest gates per layer, or its factors."""
    if generated.gates_PLE is None:
        factors = generated.adapter.scanned
        return {
            f"{site}.{name}": np.ascontiguousarray(np.asarray(x)[:, prompt])
            for site, pair in factors.items()
            for name, x in pair.items()
        }
    gates_LE = np.asarray(generated.gates_PLE)[prompt].astype(np.float32)
    index = np.argsort(-gates_LE, axis=1, kind="stable")[:, : settings.active_experts]
    weight = np.take_along_axis(gates_LE, index, axis=1)
    return {"index": index.astype(np.uint8 if gates_LE.shape[1] <= 256 else np.uint16), "weight": weight}


def check_pool(specialization: Specialization, variables: Any) -> None:
    """Gates mean something beside the pool that they were made for alone.

    Raises:
        CheckpointError: when the generator has another pool.
    """
    found, expected = pool_fingerprint(variables), specialization.fingerprints["pool"]
    if found != expected:
        raise CheckpointError(
            f"the specialisation was made with another expert pool (fingerprint {expected}, this generator's pool is"
            f" {found}): give the checkpoint that it was made with (--checkpoint)"
        )


def adapter_of(
    specialization: Specialization, variables: Any, settings: GeneratorConfig, layers: int | None = None
) -> Any:
    """The adapter of one prompt, from a specialisation and the generator that has its pool.

    Args:
        specialization: gates or factors.
        variables: of the generator.
        settings: of the generator.
        layers: L of the edge model; as the variables say when left out, which a generator with one meta token and one
            pool for all layers does not.

    Raises:
        CheckpointError: when the pool is another one than that the gates were made for, or the specialisation has
            another number of layers or experts or, for direct generation, factors of other shapes.
    """
    check_pool(specialization, variables)
    found, expected = len(next(iter(specialization.tensors.values()))), layers or _layers(variables, settings)
    if expected is not None and found != expected:
        raise CheckpointError(
            f"the specialisation is of {found} layers, the generator's edge model has {expected}: give the checkpoint"
            " and the edge model that it was made with (--checkpoint, --edge)"
        )
    if specialization.direct:
        _check_factors(specialization, variables)
        factors: dict[str, dict[str, jax.Array]] = {}
        for name, value in specialization.tensors.items():
            site, factor = name.split(".")
            factors.setdefault(site, {})[factor] = jnp.asarray(value)[:, None]
        return PromptLoRA(factors, scale=settings.alpha / settings.rank)
    gates_LE = specialization.gates(settings.num_experts)
    if specialization.tensors["index"].shape[1] > settings.active_experts:
        raise CheckpointError(
            f"the specialisation has {specialization.tensors['index'].shape[1]} gates a layer, the generator makes"
            f" {settings.active_experts}: give the checkpoint that it was made with (--checkpoint)"
        )
    flat = variables["params"]["pool"]
    sites = sorted({name.rsplit("_", 1)[0] for name in flat})
    pool = {site: {"a": flat[f"{site}_a"], "b": flat[f"{site}_b"]} for site in sites}
    return gated_adapter(jnp.asarray(gates_LE)[None], pool, settings)


def save_specialization(specialization: Specialization, directory: Path) -> None:
    """Writes the directory, complete or not at all.

    Raises:
        OutputError: when it exists and is not empty, or cannot be written.
    """
    with complete_directory(directory) as temporary:
        _write(specialization, temporary)


def save_specializations(named: Iterable[tuple[str, Specialization]], directory: Path) -> None:
    """Writes a directory with one specialisation directory for each name, all of them or nothing.

    Raises:
        OutputError: when it exists and is not empty, or cannot be written.
    """
    with complete_directory(directory) as temporary:
        for name, specialization in named:
            (temporary / name).mkdir()
            _write(specialization, temporary / name)


def load_specialization(directory: Path) -> Specialization:
    """Reads a specialisation directory, and checks all that can be said of it without its generator.

    Raises:
        CheckpointError: when it is none, or damaged; the message says what is wrong.
    """
    try:
        if not (directory / TENSORS).is_file():
            raise CheckpointError(
                f"{directory} is no specialisation (no {TENSORS}): make one with `lora-gen specialize`"
            )
        tensors, metadata = read_tensors(directory / TENSORS)
        checkpoint, versions = read_readable(directory / READABLE)
        check_size(directory / PROMPT)
        specialization = Specialization(
            tensors=tensors,
            fingerprints={name: metadata[name] for name in ("cloud", "edge", "pool")},
            # Bytes: read as text, a carriage return would become a line feed.
            prompt=(directory / PROMPT).read_bytes().decode(),
            checkpoint=checkpoint,
            versions=versions,
        )
        if specialization.digest != metadata["prompt"]:
            raise ValueError(
                f"{PROMPT} is not the prompt that it was made of (sha256 begins {specialization.digest}, not"
                f" {metadata['prompt']})"
            )
        return specialization
    except KeyError as error:
        raise CheckpointError(f"specialisation {directory} is damaged: {TENSORS} does not say {error}") from error
    except (OSError, TypeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"specialisation {directory} is damaged: {error}; make it again") from error


def _write(s: Specialization, directory: Path) -> None:
    metadata = {**s.fingerprints, "prompt": s.digest, "versions": " ".join(f"{k}={v}" for k, v in s.versions.items())}
    readable: dict[str, Any] = {
        "fingerprints": s.fingerprints,
        "prompt_sha256": s.digest,
        "checkpoint": s.checkpoint,
        "versions": s.versions,
    }
    if not s.direct:
        pairs = zip(s.tensors["index"], s.tensors["weight"], strict=True)
        readable["gates"] = [
            {str(int(e)): round(float(w), 6) for e, w in zip(index, weight, strict=True)} for index, weight in pairs
        ]
    tensors = {name: np.ascontiguousarray(value) for name, value in s.tensors.items()}
    (directory / TENSORS).write_bytes(safetensors.numpy.save(tensors, metadata))
    (directory / PROMPT).write_bytes(s.prompt.encode())
    (directory / READABLE).write_text(json.dumps(readable, indent=2) + "\n", encoding="utf-8")


def _layers(variables: Any, settings: GeneratorConfig) -> int | None:
    """L, as a generator's parameters have it; None where all layers share them."""
    if settings.pool == "per_layer" and "pool" in variables["params"]:
        return len(next(iter(variables["params"]["pool"].values())))
    return None if settings.shared_meta_token else len(variables["params"]["cloud"]["meta_embedding"])


def _check_factors(specialization: Specialization, variables: Any) -> None:
    """Raises CheckpointError unless the factors have the shapes that the generator makes."""
    head = variables["params"]["direct"]
    expected = {}
    for name in head:
        if name.endswith("_a_start"):
            site, (inputs, rank) = name.removesuffix("_a_start"), head[name].shape
            expected[f"{site}.a"] = (inputs, rank)
            expected[f"{site}.b"] = (rank, head[f"{site}_b"]["bias"].shape[0] // rank)
    found = {name: value.shape[1:] for name, value in specialization.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"the specialisation's factor {name} has the shape {found.get(name)}, the generator makes"
                f" {expected.get(name)}: give the checkpoint that it was made with (--checkpoint)"
            )
