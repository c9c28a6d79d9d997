"""What a method looks like to the decoder: an adapter.

An adapter is a pytree in two parts. `scanned` holds arrays led by the layer axis; the decoder's scan over
layers hands each layer its slice. `shared` is handed to every layer whole. The decoder asks four questions: what does
the linear layer `site` add for this input (`delta`, or the two factors of it, `lowered`), what does the FFN compute
instead (`ffn`) and what does the layer give instead (`stream`, both for the few methods that need it), and what does a
router say about each token (`record`, for losses)? It never learns which method answers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np
from flax import struct

from lora_gen_jax.errors import ConfigError

SITES = ("q", "k", "v", "o", "gate", "up", "down")
FFN_INPUT = "ffn"
"""Where `record` is asked beside the linear layers: at the input of the whole FFN."""


class FrozenFFN(NamedTuple):
    """The parts of one layer's FFN, for an adapter that puts them together in its own way.

    Attributes:
        project: from a site and its input to what the frozen linear layer gives, its bias included.
        activate: from what `gate` gave (None in a model without it) and what `up` gave to the input of `down`.
        sites: those that the model has: gate, up and down, or up and down.
    """

    project: Callable[[str, jax.Array], jax.Array]
    activate: Callable[[jax.Array | None, jax.Array], jax.Array]
    sites: tuple[str, ...]


class Adapter(Protocol):
    """What the decoder expects; `AdapterBase` is where a method starts."""

    @property
    def scanned(self) -> Any:
        """Pytree of arrays [L, ...]; inside a layer, of its slices [...]."""
        ...

    @property
    def shared(self) -> Any:
        """Pytree of arrays without a layer axis."""
        ...

    @property
    def operands(self) -> Any:
        """What its products round their operands to; None for the type of the activations."""
        ...

    def replace(self, **updates: Any) -> Self:
        """A copy with other fields (from `flax.struct.PyTreeNode`)."""
        ...

    def delta(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array | None:
        """Added to the output of linear layer `site`, inside one layer.

        Args:
            site: one of `SITES`.
            x_BTD: the layer's input, B rows of T tokens.
            key: for dropout; None when dropout is off.

        Returns:
            [B, T, outputs of the site], or None where the adapter does not change the site.
        """
        ...

    def lowered(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
        """(h [B, T, X], b [X, outputs]) whose product is `delta`, so that a layer can compute it with its own product.

        None where there is none: the adapter does not change the site, or other rows have another b.
        """
        ...

    def ffn(self, x_BTD: jax.Array, frozen: FrozenFFN, key: jax.Array | None) -> jax.Array | None:
        """The output [B, T, D] of the whole FFN; None where it is computed as always, `delta` included."""
        ...

    def stream(self, x_BTD: jax.Array, last_BT: jax.Array) -> jax.Array | None:
        """The residual stream [B, T, D] after the layer; None where it stays as it is.

        Args:
            x_BTD: what the layer gives.
            last_BT: whether a token is the last of its row's context, the one that the answer goes on from.
        """
        ...

    @property
    def elsewhere(self) -> Any:
        """The adapter of tokens with which no context ends: those that are read ahead, and those that are written."""
        ...

    def record(self, site: str, x_BTD: jax.Array) -> jax.Array | None:
        """What a router says about every token, [B, T, X] in fp32, for losses that depend on it; None without one.

        Args:
            site: one of `SITES`, or `FFN_INPUT`.
            x_BTD: the input there.
        """
        ...


class AdapterBase(struct.PyTreeNode):
    """An adapter that adds nothing: methods override what they change, and have `scanned` and `shared`.

    Attributes:
        operands: what the adapter's products round their operands to (`product`); the decoder that it is handed to
            says so.
    """

    operands: Any = struct.field(pytree_node=False, default=None, kw_only=True)

    def delta(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array | None:
        """As `Adapter.delta`."""
        return None

    def lowered(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
        """As `Adapter.lowered`."""
        return None

    def ffn(self, x_BTD: jax.Array, frozen: FrozenFFN, key: jax.Array | None) -> jax.Array | None:
        """As `Adapter.ffn`."""
        return None

    def stream(self, x_BTD: jax.Array, last_BT: jax.Array) -> jax.Array | None:
        """As `Adapter.stream`."""
        return None

    @property
    def elsewhere(self) -> Any:
        """As `Adapter.elsewhere`: itself."""
        return self

    def record(self, site: str, x_BTD: jax.Array) -> jax.Array | None:
        """As `Adapter.record`."""
        return None


class PerPrompt(AdapterBase):
    """An adapter that tells prompts apart; rows of a batch are grouped by prompt."""

    @property
    def prompts(self) -> int:
        """P."""
        raise NotImplementedError

    def take(self, index: Any) -> Self:
        """The adapter of the prompts that `index` (integers) names, in that order."""
        raise NotImplementedError

    def select(self, prompt: int) -> Self:
        """The adapter of one prompt.

        Raises:
            ConfigError: when there is no such prompt (JAX would silently give none, or the last).
        """
        if not 0 <= prompt < self.prompts:
            raise ConfigError(
                f"prompt {prompt} is not among the adapter's {self.prompts}",
                field="prompt",
                remedy=f"use 0 to {self.prompts - 1}",
            )
        return self.take(np.array([prompt]))


class Mergeable(Adapter, Protocol):
    """An adapter whose effect is a change of weights."""

    def weight_delta(self, site: str) -> jax.Array | None:
        """ΔW of one layer's `site` in fp32, [inputs, outputs], or None.

        `scanned` must be one layer's slice and the adapter must describe a single prompt.

        Raises:
            ConfigError: when the adapter holds several prompts.
        """
        ...
