"""A specialization as plain LoRA factors, which other programs know.

In: a specialization and the generator with its pool. Out: one pair per FFN site and layer, NumPy in fp32, with
ΔW = a·b at scaling 1:

    products        rank X = K·R: the K experts of each layer side by side, their gates and α/r in a
    factors         rank X = R: a = (α/r)·Σ G·A, b = Σ G·B
    direct          rank X = R: as generated, α/r in a
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.lora import PromptLoRA
from lora_gen_jax.adapters.refined import RefinedPool
from lora_gen_jax.adapters.specialization import Specialization
from lora_gen_jax.adapters.specialization_fit import adapter_of
from lora_gen_jax.config import GeneratorConfig, ModelConfig
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.pretrained import leaves
from lora_gen_jax.models import quantization_of

Factors = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedAdapter:
    """What an adapter's file says.

    Attributes:
        source: the edge model, as the user named it.
        config: of the edge model.
        factors: {site: {"a": [L, inputs, X], "b": [L, X, outputs]}} in fp32, scaling 1.
        origin: what it was made from, by name: fingerprints, the prompt's hash, versions.
    """

    source: str
    config: DecoderConfig
    factors: Factors
    origin: dict[str, str]

    @property
    def rank(self) -> int:
        """X, the same for every site and layer."""
        return next(iter(self.factors.values()))["a"].shape[-1]

    def modules(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Every adapted linear layer: its name in a Hugging Face checkpoint (model.layers.0.mlp.up_proj), and A
        [X, inputs] and B [outputs, X] as PyTorch sees them."""
        kernels = [leaf for leaf in leaves(self.config) if leaf.path[1] == "ffn" and leaf.path[-1] == "kernel"]
        for layer in range(self.config.num_layers):
            for leaf in kernels:
                if (pair := self.factors.get(leaf.path[2])) is not None:
                    name = leaf.name.format(layer=layer).removesuffix(".weight")
                    yield name, pair["a"][layer].T, pair["b"][layer].T


def lora_factors(
    specialization: Specialization, variables: Any, settings: GeneratorConfig, layers: int | None = None
) -> Factors:
    """The adapter's ΔW of every FFN site and layer as a product of two factors.

    Args:
        specialization: of one prompt.
        variables: of the generator that has its pool.
        settings: of that generator.
        layers: L of the edge model, to be checked; left out, as the variables say.

    Returns:
        {site: {"a": [L, inputs, X], "b": [L, X, outputs]}} in fp32; ΔW = a·b, with no scale left to apply.

    Raises:
        CheckpointError: as `adapter_of`, for another pool or another number of layers or experts.
    """
    adapter = adapter_of(specialization, variables, settings, layers)
    if isinstance(adapter, PromptLoRA):
        return _of_prompt(adapter)
    pool = adapter.generated if isinstance(adapter, RefinedPool) else adapter
    factors = {site: _of_pool(pool, _fp32(pair["a"]), _fp32(pair["b"])) for site, pair in pool.pool.items()}
    if isinstance(adapter, RefinedPool):
        beside = _of_prompt(adapter.factors)
        return {
            site: {x: np.concatenate([pair[x], beside[site][x]], axis=-1 if x == "a" else -2) for x in pair}
            for site, pair in factors.items()
        }
    return factors


def _of_prompt(adapter: PromptLoRA) -> Factors:
    """Factors that were learned or generated as such."""
    scale = np.float32(adapter.scale)
    return {
        site: {"a": _fp32(pair["a"])[:, 0] * scale, "b": _fp32(pair["b"])[:, 0]}
        for site, pair in adapter.scanned.items()
    }


def _of_pool(adapter: GatedPool, pool_a: np.ndarray, pool_b: np.ndarray) -> dict[str, np.ndarray]:
    """One site's factors; pool_a [E, inputs, R] and pool_b [E, R, outputs], led by L when each layer has its own."""
    # Gates and α/r go into one factor alone, the one that merging scales: each entry is rounded once, as it is there,
    # and a gate of any sign will do.
    layer_factors, scale = [], np.float32(adapter.scale)
    for layer in range(adapter.gates.shape[0]):
        gates = jax.tree.map(lambda x, layer=layer: np.asarray(x)[layer, 0], adapter.gates)
        a_EDR, b_ERF = (pool_a, pool_b) if adapter.shared is not None else (pool_a[layer], pool_b[layer])
        if adapter.mix == "factors":
            gates_E = _fp32(gates.dense())
            mixed = scale * np.einsum("e,edr->dr", gates_E, a_EDR), np.einsum("e,erf->rf", gates_E, b_ERF)
            layer_factors.append(mixed)
            continue
        weight_K = _fp32(gates.weight) * scale
        a_DX = (gates.chosen(a_EDR) * weight_K[:, None, None]).transpose(1, 0, 2).reshape(a_EDR.shape[1], -1)
        layer_factors.append((a_DX, gates.chosen(b_ERF).reshape(-1, b_ERF.shape[-1])))
    a_LDX, b_LXF = (np.stack(factor) for factor in zip(*layer_factors, strict=True))
    return {"a": a_LDX, "b": b_LXF}


def _fp32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def origin_of(specialization: Specialization, edge: ModelConfig) -> dict[str, str]:
    """What a specialization was made from: fingerprints of models and pool, the prompt's hash, versions.

    The prompt's text stays out: whoever gets the export need not read it. An export belongs to the model that the
    edge's fingerprint names, as it is stored; if the generator was trained beside quantized weights, that is said.

    Args:
        specialization: that was made.
        edge: the generator's edge model.
    """
    versions = ", ".join(f"{name} {number}" for name, number in specialization.versions.items())
    names = {"edge": "edge model", "cloud": "cloud model", "pool": "expert pool"}
    prints = {f"{names[key]} (fingerprint)": value for key, value in sorted(specialization.fingerprints.items())}
    if (quantized := quantization_of(edge)) is not None:
        prints["edge model in training"] = f"the same in {quantized}"
    return {**prints, "prompt (SHA-256, first 16 digits)": specialization.digest, "made with": versions}
