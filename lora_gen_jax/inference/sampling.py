"""Next-token logits to token ids: greedy, or drawn with temperature, top-k and top-p.

In: logits [B, V]. Out: ids [B]. The settings are arrays, not constants: other values run the same program.
"""

import jax
import jax.numpy as jnp
from flax import struct

from lora_gen_jax.errors import ConfigError


class Sampling(struct.PyTreeNode):
    """How a token is drawn; filters apply in the order of the fields, as in transformers.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only the k most likely tokens remain; 0 keeps all.
        top_p: only the smallest set of most likely tokens whose probability reaches p remains; 1 keeps all.
    """

    temperature: float | jax.Array = 0.0
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0

    def checked(self) -> "Sampling":
        """The same settings as typed arrays.

        Raises:
            ConfigError: for a value outside its range.
        """
        if not 0.0 <= float(self.temperature) < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if int(self.top_k) != self.top_k or int(self.top_k) < 0:
            raise ConfigError(f"top_k={self.top_k} must be 0 (off) or a positive whole number")
        if not 0.0 < float(self.top_p) <= 1.0:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1 (off)")
        return Sampling(jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p))


def sample(logits_BV: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """One id per row, int32 [B].

    Row i draws with its own key, derived from `key` and i: what it draws does not depend on the other rows.
    Without top-k and top-p nothing is sorted, and greedy decoding draws nothing.

    Args:
        logits_BV: fp32.
        sampling: checked settings.
        key: a typed PRNG key.
    """

    def greedy() -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits_BV.shape[0]))
        scaled_BV = logits_BV / sampling.temperature

        def plain() -> jax.Array:
            return jax.vmap(jax.random.categorical)(key_B, scaled_BV).astype(jnp.int32)

        def filtered() -> jax.Array:
            order_BV, ranked_BV = rank_and_filter(scaled_BV, sampling)
            rank_B = jax.vmap(jax.random.categorical)(key_B, ranked_BV)
            return jnp.take_along_axis(order_BV, rank_B[:, None], axis=1)[:, 0].astype(jnp.int32)

        return jax.lax.cond((sampling.top_k > 0) | (sampling.top_p < 1.0), filtered, plain)

    return jax.lax.cond(sampling.temperature == 0.0, greedy, draw)


def rank_and_filter(scaled_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Ids from most to least likely, and their logits with -inf for those that top-k and top-p drop.

    Args:
        scaled_BV: logits already divided by the temperature.
        sampling: checked settings.

    Returns:
        order_BV, ranked_BV. Among equal logits the lower id comes first, so that top-k keeps exactly k.
    """
    order_BV = jnp.argsort(scaled_BV, axis=-1, descending=True, stable=True)
    ranked_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    rank_1V = jnp.arange(scaled_BV.shape[1], dtype=jnp.int32)[None]
    ranked_BV = jnp.where((sampling.top_k > 0) & (rank_1V >= sampling.top_k), -jnp.inf, ranked_BV)
    probability_BV = jax.nn.softmax(ranked_BV, axis=-1)
    # A token stays while those before it fall short of p: the one that reaches p stays, and always the first.
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = (before_BV < sampling.top_p) | (sampling.top_p == 1.0) | (rank_1V == 0)
    return order_BV, jnp.where(kept_BV, ranked_BV, -jnp.inf)
