"""Folding an adapter into the weights, and taking it out again.

In: a decoder's parameters and a mergeable adapter of one prompt. Out: parameters of the same shapes, types and
shardings: an ordinary model with no extra parameters.

Subtracting ΔW returns to the base within rounding (about one fp32 entry in two hundred differs in its last bit).
Exact return means keeping the base: `merge` leaves it alone, `merge_donated` gives its memory to the result.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lora_gen_jax.adapters.protocol import SITES, Mergeable

GROUP_OF_SITE = {site: "attention" if site in ("q", "k", "v", "o") else "ffn" for site in SITES}


def _merge(params: Any, adapter: Mergeable, sign: float) -> Any:
    layers = {name: dict(group) if name in ("attention", "ffn") else group for name, group in params["layers"].items()}
    for site in SITES:
        group = layers[GROUP_OF_SITE[site]]
        if site in group:
            group[site] = {**group[site], "kernel": _merge_site(group[site]["kernel"], adapter, site, sign)}
    return {**params, "layers": layers}


def _merge_site(kernel_LDF: jax.Array, adapter: Mergeable, site: str, sign: float) -> jax.Array:
    first = adapter.replace(scanned=jax.tree.map(lambda x: x[0], adapter.scanned))
    if jax.eval_shape(lambda one: one.weight_delta(site), first) is None:
        return kernel_LDF

    # Layer by layer, in place: ΔW of all layers at once would be a second copy of the FFN.
    def body(layer: jax.Array, kernel: jax.Array) -> jax.Array:
        one = adapter.replace(scanned=jax.tree.map(lambda x: x[layer], adapter.scanned))
        delta = one.weight_delta(site)
        assert delta is not None
        merged = kernel[layer].astype(jnp.float32) + sign * delta
        return kernel.at[layer].set(merged.astype(kernel.dtype))

    return jax.lax.fori_loop(0, kernel_LDF.shape[0], body, kernel_LDF)


_keeping = jax.jit(_merge)
_donating = jax.jit(_merge, donate_argnums=0)


def merge(params: Any, adapter: Mergeable) -> Any:
    """Parameters with ΔW added, computed in fp32 and stored in each weight's own type; `params` stays valid.

    Raises:
        ConfigError: when the adapter holds several prompts.
    """
    return _keeping(params, adapter, 1.0)


def merge_donated(params: Any, adapter: Mergeable) -> Any:
    """As `merge`, in the memory of `params`, which is invalid afterwards.

    Raises:
        ConfigError: when the adapter holds several prompts.
    """
    return _donating(params, adapter, 1.0)


def unmerge(params: Any, adapter: Mergeable) -> Any:
    """Parameters with ΔW taken out again, equal to the base within rounding; `params` stays valid."""
    return _keeping(params, adapter, -1.0)


def unmerge_donated(params: Any, adapter: Mergeable) -> Any:
    """As `unmerge`, in the memory of `params`."""
    return _donating(params, adapter, -1.0)
