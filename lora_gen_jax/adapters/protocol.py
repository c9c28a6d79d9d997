"""What a method looks like to the decoder: an adapter.

An adapter is a pytree in two parts. `scanned` holds arrays led by the layer axis; the decoder's scan over
layers hands each layer its slice. `shared` is handed to every layer whole. The decoder asks one question,
`delta`: what does the linear layer `site` add for this input? It never learns which method answers.
"""

from typing import Any, Protocol, Self

import jax

SITES = ("q", "k", "v", "o", "gate", "up", "down")


class Adapter(Protocol):
    """Base class of methods is `flax.struct.PyTreeNode`; this is what they provide."""

    @property
    def scanned(self) -> Any:
        """Pytree of arrays [L, ...]; inside a layer, of its slices [...]."""
        ...

    @property
    def shared(self) -> Any:
        """Pytree of arrays without a layer axis."""
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
            [B, T, outputs of the site], or None where the adapter leaves the site alone.
        """
        ...


class PerPrompt(Adapter, Protocol):
    """An adapter that tells prompts apart; rows of a batch are grouped by prompt."""

    @property
    def prompts(self) -> int:
        """P."""
        ...

    def take(self, index: Any) -> Self:
        """The adapter of the prompts that `index` (integers) names, in that order."""
        ...


class Mergeable(Adapter, Protocol):
    """An adapter whose effect is a change of weights."""

    def weight_delta(self, site: str) -> jax.Array | None:
        """ΔW of one layer's `site` in fp32, [inputs, outputs], or None.

        `scanned` must be one layer's slice and the adapter must describe a single prompt.

        Raises:
            ConfigError: when the adapter holds several prompts.
        """
        ...
