"""Folding an adapter into the weights, and taking it out again.

In: a decoder's parameters and a mergeable adapter of one prompt. Out: parameters of the same shapes, types and
shardings: an ordinary model with no extra parameters.

Subtracting ΔW returns to the base within rounding (about one fp32 entry in two hundred differs in its last bit). Exact
return means keeping the base: `merge` leaves it unchanged, `merge_over` writes the next specialization over the last
one, `merge_donated` gives the base's memory to the result.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from lora_gen_jax.adapters.protocol import SITES, Mergeable
from lora_gen_jax.decoder.quantized import format_of
from lora_gen_jax.errors import ConfigError

Kernels = dict[str, jax.Array]
GROUP_OF_SITE = {site: "attention" if site in ("q", "k", "v", "o") else "ffn" for site in SITES}


def changed_sites(params: Any, adapter: Mergeable) -> list[str]:
    """The linear layers that the adapter changes.

    Raises:
        ConfigError: when it has another number of layers, or other shapes, than the weights, or changes none of them,
            or they are quantized.
    """
    leaves, structure = jax.tree.flatten(adapter)
    deltas = _deltas(structure, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))
    sites = [site for site in deltas if site in params["layers"][GROUP_OF_SITE[site]]]
    layers = {x.shape[0] for x in jax.tree.leaves(adapter.scanned)}
    for site, kernel in kernels_of(params, sites).items():
        if layers != {kernel.shape[0]} or deltas[site] != kernel.shape[1:]:
            raise ConfigError(
                f"the adapter changes {site} in {'/'.join(map(str, sorted(layers)))} layers by ΔW of {deltas[site]},"
                f" and the weights are {kernel.shape[0]} layers of {kernel.shape[1:]}: it was made for another model",
                field=f"adapter.{site}",
            )
    if layers and not sites:
        raise ConfigError(
            f"the adapter changes none of the linear layers {', '.join(SITES)} of these weights", field="adapter"
        )
    for site, kernel in kernels_of(params, sites).items():
        if (found := format_of(kernel)) is not None:
            raise ConfigError(
                f"edge.weights is {found}: merged into {site}, an update would be rounded to the steps of its codes",
                field="edge.weights",
                code="quantized",
                remedy="load the edge with --edge.weights bfloat16, which the same generator fits, or pass the adapter"
                " beside the weights",
            )
    return sites


@functools.lru_cache(maxsize=64)
def _deltas(structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of one layer's ΔW for every site that has one."""
    adapter = jax.tree.unflatten(structure, shapes)

    def deltas(adapter: Mergeable) -> dict[str, jax.Array | None]:
        first = adapter.replace(scanned=jax.tree.map(lambda x: x[0], adapter.scanned))
        return {site: first.weight_delta(site) for site in SITES}

    return {site: delta.shape for site, delta in jax.eval_shape(deltas, adapter).items() if delta is not None}


def kernels_of(params: Any, sites: Sequence[str]) -> Kernels:
    """{site: [L, inputs, outputs]}."""
    return {site: params["layers"][GROUP_OF_SITE[site]][site]["kernel"] for site in sites}


def with_kernels(params: Any, kernels: Kernels) -> Any:
    """Parameters with other kernels at some sites; the rest is shared."""
    layers = {name: dict(group) if name in ("attention", "ffn") else group for name, group in params["layers"].items()}
    for site, kernel in kernels.items():
        group = layers[GROUP_OF_SITE[site]]
        group[site] = {**group[site], "kernel": kernel}
    return {**params, "layers": layers}


def _add(targets: Kernels | None, kernels: Kernels, adapter: Mergeable, sign: float) -> Kernels:
    """kernel + sign·ΔW for each site, written over `targets`; over the kernels themselves where there are none."""

    # Layer by layer, in place: ΔW of all layers at once would be a second copy of the FFN. All sites in one loop: while
    # one is written, which the memory limits, another's ΔW is computed.
    def body(layer: jax.Array, written: Kernels) -> Kernels:
        one = adapter.replace(scanned=jax.tree.map(lambda x: x[layer], adapter.scanned))
        read = written if targets is None else kernels

        def site(name: str) -> jax.Array:
            delta = one.weight_delta(name)
            assert delta is not None
            merged = read[name][layer].astype(float) + sign * delta
            return written[name].at[layer].set(merged.astype(written[name].dtype))

        return {name: site(name) for name in written}

    start = kernels if targets is None else targets
    return jax.lax.fori_loop(0, len(next(iter(start.values()))), body, start) if start else {}


def _sum(kernels: Kernels, adapter: Mergeable, sign: float) -> Kernels:
    return _add(None, kernels, adapter, sign)


# Of the parameters only what changes passes through a compiled program, which would copy the rest, too.
_keeping = jax.jit(_sum)
_donating = jax.jit(_sum, donate_argnums=0)


@functools.partial(jax.jit, donate_argnums=0)
def _writing_over(targets: Kernels, kernels: Kernels, adapter: Mergeable) -> Kernels:
    return _add(targets, kernels, adapter, 1.0)


def _merged(add: Any, params: Any, adapter: Mergeable, sign: float) -> Any:
    return with_kernels(params, add(kernels_of(params, changed_sites(params, adapter)), adapter, sign))


def merge(params: Any, adapter: Mergeable) -> Any:
    """Parameters with ΔW added, computed in fp32 and stored in each weight's own type.

    `params` stays valid; weights that do not change are shared with it.

    Raises:
        ConfigError: when the adapter holds several prompts, or was made for another model, or for quantized weights.
    """
    return _merged(_keeping, params, adapter, 1.0)


def merge_donated(params: Any, adapter: Mergeable) -> Any:
    """As `merge`, in the memory of `params`, whose changed weights are invalid afterwards."""
    return _merged(_donating, params, adapter, 1.0)


def merge_over(held: Any, params: Any, adapter: Mergeable) -> Any:
    """As `merge`, in the memory of an earlier result, for little more than reading and writing the changed weights.

    Nothing drifts, since the base is read each time; going back to the base is using `params`.

    Args:
        held: what `merge` or this function gave for the same base and an adapter of the same sites; invalid afterwards.
        params: the base, which stays valid.
        adapter: the next one, of a single prompt.

    Returns:
        the specialized parameters, bit for bit those of `merge(params, adapter)`.

    Raises:
        ConfigError: when `held` is the base itself, was merged at other sites, or the adapter holds several prompts.
    """
    sites = changed_sites(params, adapter)
    base, targets = kernels_of(params, sites), kernels_of(held, sites)
    if any(targets[site] is base[site] for site in sites):
        raise ConfigError(
            "the weights to write over are the base's own",
            field="held",
            code="base",
            remedy="start with merge(params, adapter)",
        )
    others = [site for site in SITES if site not in sites and site in params["layers"][GROUP_OF_SITE[site]]]
    own, found = kernels_of(params, others), kernels_of(held, others)
    if other := [site for site in others if found[site] is not own[site]]:
        raise ConfigError(
            f"the weights to write over differ from the base at {', '.join(other)}, which the adapter does not change",
            field="held",
            remedy="start with merge(params, adapter)",
        )
    for site in sites:
        if (targets[site].shape, targets[site].dtype) != (base[site].shape, base[site].dtype):
            raise ConfigError(
                f"the weights to write over are {targets[site].dtype} at {site}, the base's {base[site].dtype}",
                field=f"held.{site}",
                remedy="start with merge(params, adapter)",
            )
    return with_kernels(params, _writing_over(targets, base, adapter))


def unmerge(params: Any, adapter: Mergeable) -> Any:
    """Parameters with ΔW taken out again, equal to the base within rounding; `params` stays valid."""
    return _merged(_keeping, params, adapter, -1.0)


def unmerge_donated(params: Any, adapter: Mergeable) -> Any:
    """As `unmerge`, in the memory of `params`."""
    return _merged(_donating, params, adapter, -1.0)
