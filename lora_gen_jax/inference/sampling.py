"""Next-token logits to token ids: greedy, or drawn with temperature, top-k and top-p.

In: logits [B, V]. Out: ids [B]. The settings are arrays, not constants: other values run the same program, and every
row may have its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_gen_jax.errors import ConfigError


class Sampling(struct.PyTreeNode):
    """How a token is drawn; filters apply in the order of the fields, as in transformers.

    Attributes:
        temperature: logits are divided by it; 0, or less than a millionth, takes the most likely token.
        top_k: only the k most likely tokens remain; 0 keeps all.
        top_p: only the smallest set of most likely tokens whose probability reaches p remains; 1 keeps all.
    """

    temperature: float | jax.Array | np.ndarray = 0.0
    top_k: int | jax.Array | np.ndarray = 0
    top_p: float | jax.Array | np.ndarray = 1.0

    def check(self) -> None:
        """Raises ConfigError for a value outside its range."""
        if not 0.0 <= float(self.temperature) < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature} must be 0 (greedy) or a positive number", field="temperature"
            )
        if int(self.top_k) != self.top_k or not 0 <= int(self.top_k) < 2**31:
            raise ConfigError(f"top_k={self.top_k} must be 0 (off) or a positive whole number", field="top_k")
        if not 0.0 < float(self.top_p) <= 1.0:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1 (off)", field="top_p")

    def checked(self) -> "Sampling":
        """The same settings as typed arrays.

        Raises:
            ConfigError: for a value outside its range.
        """
        self.check()
        return Sampling(jnp.asarray(self.temperature, float), jnp.int32(self.top_k), jnp.asarray(self.top_p, float))


def row_keys(key: jax.Array, step: jax.Array | int, rows: int) -> jax.Array:
    """Keys [B] for one step of `rows` rows: what a row draws depends on its index, not on the other rows."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(rows))


def sample(logits_BV: jax.Array, sampling: Sampling, key_B: jax.Array) -> jax.Array:
    """One id per row, int32 [B].

    Without top-k and top-p nothing is sorted, and greedy decoding draws nothing. What a row draws does not depend on
    the other rows' settings.

    Args:
        logits_BV: fp32.
        sampling: checked settings: numbers for all rows, or arrays [B].
        key_B: typed PRNG keys.
    """
    rows = logits_BV.shape[:1]
    temperature_B = jnp.broadcast_to(sampling.temperature, rows)
    # Divided by less, logits would leave the range of fp32; there is no draw left in them before that.
    greedy_B = temperature_B < 1e-6
    filtered_B = jnp.broadcast_to((sampling.top_k > 0) | (sampling.top_p < 1.0), rows)

    def likeliest() -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, temperature_B)[:, None]

        def plain() -> jax.Array:
            return jax.vmap(jax.random.categorical)(key_B, scaled_BV).astype(jnp.int32)

        def filtered() -> jax.Array:
            order_BV, ranked_BV = rank_and_filter(scaled_BV, sampling)
            rank_B = jax.vmap(jax.random.categorical)(key_B, ranked_BV)
            id_B = jnp.take_along_axis(order_BV, rank_B[:, None], axis=1)[:, 0].astype(jnp.int32)
            return jnp.where(filtered_B, id_B, plain())

        return jnp.where(greedy_B, likeliest(), jax.lax.cond(jnp.any(filtered_B & ~greedy_B), filtered, plain))

    return jax.lax.cond(jnp.all(greedy_B), likeliest, draw)


def rank_and_filter(scaled_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Ids from most to least likely, and their logits with -inf for those that top-k and top-p drop.

    Args:
        scaled_BV: logits already divided by the temperature.
        sampling: checked settings: numbers for all rows, or arrays [B].

    Returns:
        order_BV, ranked_BV. Among equal logits the lower id comes first, so that top-k keeps exactly k.
    """
    order_BV = jnp.argsort(scaled_BV, axis=-1, descending=True, stable=True)
    ranked_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    rank_1V = jnp.arange(scaled_BV.shape[1], dtype=jnp.int32)[None]
    top_k_B1, top_p_B1 = (jnp.broadcast_to(x, len(scaled_BV))[:, None] for x in (sampling.top_k, sampling.top_p))
    ranked_BV = jnp.where((top_k_B1 > 0) & (rank_1V >= top_k_B1), -jnp.inf, ranked_BV)
    probability_BV = jax.nn.softmax(ranked_BV, axis=-1)
    # A token stays while those before it fall short of p: the one that reaches p stays, and always the first.
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = (before_BV < top_p_B1) | (top_p_B1 == 1.0) | (rank_1V == 0)
    return order_BV, jnp.where(kept_BV, ranked_BV, -jnp.inf)
