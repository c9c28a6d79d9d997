"""A specialization on disk: the sparse gates of one prompt, a thousand bytes beside a pool that is found again.

In: what the generator said about one prompt. Out: a directory with `specialization.safetensors` (gates and
fingerprints), `prompt.txt` and `specialization.json` (readable). Signed gates of all experts are stored in 8 bits each,
with a scale for every layer. Factors are stored in full: those of direct generation, which has no gates, and those
that refining has put beside the gates.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import safetensors.numpy

from lora_gen_jax.adapters.specialization_check import check_size, read_readable, read_refined, read_tensors, reading
from lora_gen_jax.errors import CheckpointError
from lora_gen_jax.files import complete_directory, writing
from lora_gen_jax.generator.router import Gates
from lora_gen_jax.generator.trained_module import Generated
from lora_gen_jax.untrusted import check_digests, digest_of, file_digest

if TYPE_CHECKING:
    from lora_gen_jax.config import GeneratorConfig

TENSORS, PROMPT, READABLE = "specialization.safetensors", "prompt.txt", "specialization.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Specialization:
    """One prompt's specialization.

    Attributes:
        tensors: {"index": [L, K], "weight": [L, K]}, or {"weight": int8 [L, E], "scale": [L]} for linear routing;
            beside them {"site.a": [L, inputs, X], "site.b": [L, X, outputs]} where factors were learned. Direct
            generation has only such factors.
        fingerprints: of the cloud model, the edge model and the pool.
        prompt: the text that it was generated from.
        checkpoint: where the generator was, when it was made; None for the one that is shipped.
        versions: of the packages it was made with.
        refined: how it was refined (`lora_gen_jax.specialization`); None where it was only read.
    """

    tensors: dict[str, np.ndarray]
    fingerprints: dict[str, str]
    prompt: str
    checkpoint: str | None
    versions: dict[str, str]
    refined: dict[str, Any] | None = None

    @property
    def direct(self) -> bool:
        """It has no gates."""
        return "weight" not in self.tensors

    @property
    def dense(self) -> bool:
        """Its gates are signed, and of all experts."""
        return "scale" in self.tensors

    @property
    def factors(self) -> dict[str, dict[str, np.ndarray]]:
        """{site: {"a": [L, inputs, X], "b": [L, X, outputs]}}; empty where there are only gates."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, value in self.tensors.items():
            site, dot, factor = name.partition(".")
            if dot:
                found.setdefault(site, {})[factor] = value
        return found

    @property
    def active(self) -> int:
        """Gates that a layer has; 0 for direct generation."""
        return 0 if self.direct else self.tensors["weight"].shape[1]

    @property
    def digest(self) -> str:
        """16 hex digits that identify the prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]

    def gates(self, num_experts: int) -> Gates:
        """The gates over a pool of so many experts, [L, K] in fp32.

        Raises:
            CheckpointError: for direct generation, which has none, or a gate of an expert that does not exist.
        """
        if self.direct:
            raise CheckpointError(
                "this specialization has no gates: its generator makes the factors directly", field=f"{TENSORS}:index"
            )
        if self.dense:
            weight, scale = self.tensors["weight"], self.tensors["scale"]
            if weight.shape[1] != num_experts:
                raise CheckpointError(
                    f"the specialization has gates of {weight.shape[1]} experts, but the pool has {num_experts}",
                    field=f"{TENSORS}:weight",
                    remedy="give the checkpoint that it was made with (--checkpoint)",
                )
            return Gates.of_all(weight.astype(np.float32) * scale.astype(np.float32)[:, None])
        index, weight = self.tensors["index"].astype(np.int32), self.tensors["weight"].astype(np.float32)
        if index.shape[1] > num_experts or index.max() >= num_experts:
            raise CheckpointError(
                f"the specialization has {index.shape[1]} gates a layer, up to that of expert {index.max()}, but the"
                f" pool has {num_experts} experts",
                field=f"{TENSORS}:index",
                remedy="give the checkpoint that it was made with (--checkpoint)",
            )
        return Gates(index, weight, num_experts)


def sparse_tensors(generated: Generated, settings: "GeneratorConfig", prompt: int = 0) -> dict[str, np.ndarray]:
    """What is stored of one of the prompts: its gates, or its factors."""
    if generated.gates is None:
        factors = generated.adapter.scanned
        return {
            f"{site}.{name}": np.ascontiguousarray(np.asarray(x)[:, prompt])
            for site, pair in factors.items()
            for name, x in pair.items()
        }
    return gate_tensors(jax.tree.map(lambda x: np.asarray(x)[prompt], generated.gates), settings)


def gate_tensors(gates: Gates, settings: "GeneratorConfig") -> dict[str, np.ndarray]:
    """What is stored of gates [L, K]: which experts, and their weights; of signed gates of all, 8 bits each."""
    weight = gates.weight.astype(np.float32)
    if settings.routing == "linear":
        # A layer without any gate keeps zeros, whatever its scale.
        scale_L = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny * 127) / np.float32(127)
        return {"weight": np.rint(weight / scale_L[:, None]).astype(np.int8), "scale": scale_L}
    index = np.broadcast_to(np.arange(gates.experts), weight.shape) if gates.index is None else gates.index
    return {"index": index.astype(np.uint8 if gates.experts <= 256 else np.uint16), "weight": weight}


def save_specialization(specialization: Specialization, directory: str | Path) -> None:
    """Writes the directory, complete or not at all.

    Raises:
        OutputError: when it exists and is not empty, or cannot be written.
    """
    with complete_directory(Path(directory)) as temporary, writing(Path(directory)):
        _write(specialization, temporary)


def save_specializations(named: Iterable[tuple[str, Specialization]], directory: Path) -> None:
    """Writes a directory with one specialization directory for each name, all of them or nothing.

    Raises:
        OutputError: when it exists and is not empty, or cannot be written.
    """
    with complete_directory(directory) as temporary, writing(directory):
        for name, specialization in named:
            (temporary / name).mkdir()
            _write(specialization, temporary / name)


def load_specialization(directory: str | Path) -> Specialization:
    """Reads a specialization directory, and checks all that can be said of it without its generator.

    Raises:
        CheckpointError: when it is none, or damaged; the message says what is wrong.
    """
    directory = Path(directory)
    with reading(directory / TENSORS):
        exists = (directory / TENSORS).is_file()
    if not exists:
        raise CheckpointError(
            f"{directory} is not a specialization (it has no {TENSORS})",
            field=TENSORS,
            remedy="make one with `lora-gen specialize`",
        )
    with reading(directory / TENSORS):
        tensors, metadata = read_tensors(directory / TENSORS)
        fingerprints, digest = {name: metadata[name] for name in ("cloud", "edge", "pool")}, metadata["prompt"]
        refined = read_refined(metadata.get("refined"), f"{TENSORS}:refined")
    with reading(directory / READABLE):
        checkpoint, versions, digests = read_readable(directory / READABLE)
    with reading(directory / TENSORS):
        if digests:  # older versions wrote none
            check_digests({TENSORS: file_digest(directory / TENSORS)}, digests, "its files")
    with reading(directory / PROMPT):
        check_size(directory / PROMPT)
        # Bytes: read as text, a carriage return would become a line feed.
        prompt = (directory / PROMPT).read_bytes().decode()
        specialization = Specialization(tensors, fingerprints, prompt, checkpoint, versions, refined)
        if specialization.digest != digest:
            raise CheckpointError(
                f"{PROMPT} is not the prompt that it was made of (its sha256 begins {specialization.digest}, not"
                f" {digest})",
                field=f"{PROMPT}:sha256",
            )
    return specialization


def _write(s: Specialization, directory: Path) -> None:
    metadata = {**s.fingerprints, "prompt": s.digest, "versions": " ".join(f"{k}={v}" for k, v in s.versions.items())}
    readable: dict[str, Any] = {
        "fingerprints": s.fingerprints,
        "prompt_sha256": s.digest,
        "checkpoint": s.checkpoint,
        "versions": s.versions,
    }
    if s.refined is not None:
        metadata["refined"] = json.dumps(s.refined)
        readable["refined"] = s.refined
    if not s.direct:
        readable["gates"] = _readable_gates(s)
    stored = safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in s.tensors.items()}, metadata)
    readable["sha256"] = {TENSORS: digest_of(stored)}
    (directory / TENSORS).write_bytes(stored)
    (directory / PROMPT).write_bytes(s.prompt.encode())
    (directory / READABLE).write_text(json.dumps(readable, indent=2) + "\n", encoding="utf-8")


def _readable_gates(s: Specialization) -> list[dict[str, float]]:
    """{expert: gate} of every layer; of signed gates the largest eight, either way."""
    if s.dense:
        gates_LE = s.gates(s.active).weight
        index_LK = np.argsort(-np.abs(gates_LE), axis=1, kind="stable")[:, :8]
        weight_LK = np.take_along_axis(gates_LE, index_LK, axis=1)
    else:
        index_LK, weight_LK = s.tensors["index"], s.tensors["weight"]
    layers = zip(index_LK, weight_LK, strict=True)
    return [{str(int(e)): round(float(w), 6) for e, w in zip(index, weight, strict=True)} for index, weight in layers]
