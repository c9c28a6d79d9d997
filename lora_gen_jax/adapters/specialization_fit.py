"""Whether a specialization fits a generator, and the adapter that both together give.

In: a `Specialization` and a generator's variables and settings. Out: an adapter of one prompt, or an error that says
what does not fit. Gates are valid only with the pool that they were generated for.
"""

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax.adapters.lora import PromptLoRA
from lora_gen_jax.adapters.refined import RefinedPool
from lora_gen_jax.adapters.specialization import TENSORS, Specialization
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.errors import CheckpointError
from lora_gen_jax.generator.lora_gen import gated_adapter
from lora_gen_jax.untrusted import check_tensors, flatten

if TYPE_CHECKING:
    from lora_gen_jax.config import GeneratorConfig

_REMEDY = "give the checkpoint that it was made with (--checkpoint)"


def pool_fingerprint(variables: Any) -> str:
    """16 hex digits that identify a generator's expert pool; of direct generation, what makes the factors."""
    params = variables["params"]
    made_from = params["pool"] if "pool" in params else params["direct"]
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(made_from), key=lambda item: str(item[0])):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}".encode())
        digest.update(np.asarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a specialization must be like to be a generator's; found once for any number of them.

    Attributes:
        pool: fingerprint.
        layers: L of the edge model; None where it is not known.
        experts, active: E and K; 0 for direct generation.
        factors: {"site.a": (inputs, R), "site.b": (R, outputs)} of direct generation, else empty.
        sites: {site: (inputs, outputs)} of the pool, where factors may stand beside its update.
        dense: its gates are signed, and of all experts.
    """

    pool: str
    layers: int | None
    experts: int
    active: int
    factors: dict[str, tuple[int, ...]]
    sites: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    dense: bool = False

    @classmethod
    def of(cls, variables: Any, settings: "GeneratorConfig", layers: int | None = None) -> "Fit":
        """What a generator's specializations are like.

        Args:
            variables, settings: of the generator.
            layers: L of the edge model; as the variables say when left out, which a generator with one meta token and
                one pool for all layers does not.
        """
        direct = "pool" not in variables["params"]
        return cls(
            pool=pool_fingerprint(variables),
            layers=layers or _layers(variables, settings),
            experts=0 if direct else settings.num_experts,
            active=0 if direct else settings.active_experts,
            factors=_factors(variables["params"]["direct"]) if direct else {},
            sites={} if direct else {s: (x["a"].shape[-2], x["b"].shape[-1]) for s, x in pool_of(variables).items()},
            dense=settings.routing == "linear",
        )

    def check(self, specialization: Specialization) -> None:
        """Raises CheckpointError unless the specialization is one of the generator's."""
        found, expected = self.pool, specialization.fingerprints["pool"]
        if found != expected:
            raise CheckpointError(
                f"the specialization was made with another expert pool (fingerprint {expected}, this generator's is"
                f" {found})",
                field=f"{TENSORS}:pool",
                remedy=_REMEDY,
            )
        layers = len(next(iter(specialization.tensors.values())))
        if self.layers is not None and layers != self.layers:
            raise CheckpointError(
                f"the specialization is of {layers} layers, the generator's edge model has {self.layers}",
                field="layers",
                remedy="give the checkpoint and the edge model that it was made with (--checkpoint, --edge)",
            )
        if specialization.direct != bool(self.factors):
            had, made = ("factors", "gates") if specialization.direct else ("gates", "factors")
            raise CheckpointError(
                f"the specialization holds {had}, the generator makes {made}", field=TENSORS, remedy=_REMEDY
            )
        if not specialization.direct:
            self._check_gates(specialization)
            self._check_beside(specialization)
            return
        shapes = {name: value.shape[1:] for name, value in specialization.tensors.items()}
        for name in sorted(self.factors.keys() | shapes.keys()):
            if shapes.get(name) != self.factors.get(name):
                raise CheckpointError(
                    f"the specialization's factor {name} has the shape {shapes.get(name)}, the generator makes"
                    f" {self.factors.get(name)}",
                    field=f"{TENSORS}:{name}",
                    remedy=_REMEDY,
                )

    def _check_gates(self, specialization: Specialization) -> None:
        if specialization.dense != self.dense:
            had, made = ("signed gates", "a choice") if specialization.dense else ("a choice", "signed gates")
            raise CheckpointError(
                f"the specialization holds {had}, the generator makes {made}", field=TENSORS, remedy=_REMEDY
            )
        specialization.gates(self.experts)
        if (gates := specialization.active) > self.active:
            raise CheckpointError(
                f"the specialization has {gates} gates a layer, the generator makes {self.active}",
                field=f"{TENSORS}:index",
                remedy=_REMEDY,
            )

    def _check_beside(self, specialization: Specialization) -> None:
        """Factors beside the gates must fit the same weights."""
        factors = specialization.factors
        if not factors:
            return
        rank = next((pair["a"].shape[-1] for pair in factors.values() if "a" in pair), 0)
        wanted = {site: {"a": (inputs, rank), "b": (rank, outputs)} for site, (inputs, outputs) in self.sites.items()}
        for site in sorted(factors.keys() | wanted.keys()):
            found = {x: value.shape[1:] for x, value in factors.get(site, {}).items()}
            if found != wanted.get(site, {}):
                raise CheckpointError(
                    f"the specialization's factors of {site} have the shapes {found}, the edge model takes"
                    f" {wanted.get(site, {})}",
                    field=f"{TENSORS}:{site}",
                    remedy=_REMEDY,
                )


def adapter_of(
    specialization: Specialization, variables: Any, settings: "GeneratorConfig", layers: int | None = None
) -> Any:
    """The adapter of one prompt, from a specialization and the generator that has its pool.

    Args:
        specialization: gates or factors.
        variables, settings: of the generator.
        layers: as of `Fit.of`.
    """
    Fit.of(variables, settings, layers).check(specialization)
    return fitted_adapter(specialization, variables, settings)


def fitted_adapter(specialization: Specialization, variables: Any, settings: "GeneratorConfig") -> Any:
    """As `adapter_of`, of a specialization that was checked already: the pool is not read again."""
    factors = {
        site: {x: jnp.asarray(value)[:, None] for x, value in pair.items()}
        for site, pair in specialization.factors.items()
    }
    if specialization.direct:
        return PromptLoRA(factors, scale=settings.alpha / settings.rank)
    gates = jax.tree.map(lambda x: jnp.asarray(x)[None], specialization.gates(settings.num_experts))
    pool = gated_adapter(gates, pool_of(variables), settings)
    return RefinedPool.of(pool, factors) if factors else pool


def pool_of(variables: Any) -> dict[str, dict[str, Any]]:
    """{site: {"a": [(L,) E, inputs, R], "b": [(L,) E, R, outputs]}} of a generator that has gates."""
    pool: dict[str, dict[str, Any]] = {}
    for name, value in sorted(variables["params"]["pool"].items()):
        site, factor = name.rsplit("_", 1)
        pool.setdefault(site, {})[factor] = value
    return pool


def check_pool(variables: Any, settings: "GeneratorConfig", edge: DecoderConfig, place: str) -> None:
    """A generator's pool, or what makes the factors of direct generation, must be of the edge model's shapes.

    Raises:
        CheckpointError: naming the tensor.
    """
    params, rank = variables["params"], settings.rank
    if "pool" in params:
        lead = ((edge.num_layers,) if settings.pool == "per_layer" else ()) + (settings.num_experts,)
        wanted = {
            f"pool/{site}_{x}": (*lead, *shape)
            for site, (inputs, outputs) in edge.ffn_shapes.items()
            for x, shape in (("a", (inputs, rank)), ("b", (rank, outputs)))
        }
        check_tensors(dict(flatten(params["pool"], "pool/")), wanted, place)
        return
    wanted = {f"direct/{site}_a_start": (inputs, rank) for site, (inputs, _) in edge.ffn_shapes.items()}
    wanted |= {f"direct/{site}_b/bias": (rank * outputs,) for site, (_, outputs) in edge.ffn_shapes.items()}
    found = dict(flatten(params["direct"], "direct/"))
    check_tensors({name: x for name, x in found.items() if name.endswith(("_a_start", "_b/bias"))}, wanted, place)


def _layers(variables: Any, settings: "GeneratorConfig") -> int | None:
    """L, as a generator's parameters have it; None where all layers share them."""
    if settings.pool == "per_layer" and "pool" in variables["params"]:
        return len(next(iter(variables["params"]["pool"].values())))
    return None if settings.shared_meta_token else len(variables["params"]["cloud"]["meta_embedding"])


def _factors(head: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's factors, from the parameters of the head that makes them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in head:
        if name.endswith("_a_start"):
            site, (inputs, rank) = name.removesuffix("_a_start"), head[name].shape
            shapes[f"{site}.a"] = (inputs, rank)
            shapes[f"{site}.b"] = (rank, head[f"{site}_b"]["bias"].shape[0] // rank)
    return shapes
