"""From meta tokens to gates: equations 5 to 7 and the balance loss.

In: meta tokens [B, L, C], one per edge layer. Out: `Gates`: for each of them the K experts that it chooses, and their
weights. The functions are plain and need no Flax; `Router` adds the parameters and the running statistics.
"""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_gen_jax.errors import ConfigError

Routing = Literal["keep_top_k", "gumbel_top_k", "gumbel", "linear"]
Variance = Literal["unbiased", "biased"]


class Gates(struct.PyTreeNode):
    """The experts that each row uses, with their weights; arrays of NumPy or JAX.

    Attributes:
        index: [..., K], numbers of experts; None where a row uses all of them, in order.
        weight: [..., K].
        experts: E, of the pool.
    """

    index: Any
    weight: Any
    experts: int = struct.field(pytree_node=False)

    @classmethod
    def of_all(cls, weight: Any) -> "Gates":
        """Of weights [..., E] of all experts."""
        return cls(None, weight, weight.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `dense`: [..., E]."""
        return (*self.weight.shape[:-1], self.experts)

    @property
    def active(self) -> int:
        """K."""
        return self.weight.shape[-1]

    def by_layer(self) -> "Gates":
        """[P, L, K] as [L, P, K], or back."""
        return jax.tree.map(lambda x: x.swapaxes(0, 1), self)

    def chosen(self, values: Any) -> Any:
        """Of values [E, …] those of the experts that a single row uses, [K, …]."""
        return values if self.index is None else values[self.index]

    def dense(self) -> Any:
        """The weights of all experts, [..., E]; zero where one is not used."""
        if self.index is None:
            return self.weight
        expert = np.arange(self.experts, dtype=self.index.dtype).reshape(*(1,) * self.index.ndim, -1)
        chosen = self.index[..., None] == expert
        return (chosen.astype(self.weight.dtype) * self.weight[..., None]).sum(axis=-2)


def keep_top_k(probabilities_BLE: jax.Array, k: int) -> Gates:
    """Equations 6 and 7: the K largest of each row, renormalized to sum 1.

    K = 1 keeps the probability as it is: renormalized, every gate would be 1 and the language-model loss could
    teach the router nothing. The K entries are chosen by index, so a tie keeps K entries and not more.
    """
    weight, index = jax.lax.top_k(probabilities_BLE, k)
    if k > 1:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return Gates(index, weight, probabilities_BLE.shape[-1])


def gumbel_softmax(logits_BLE: jax.Array, key: jax.Array | None, temperature: float) -> jax.Array:
    """softmax((logits + Gumbel noise) / temperature), all experts; no noise without a key."""
    if key is not None:
        logits_BLE = logits_BLE + jax.random.gumbel(key, logits_BLE.shape, logits_BLE.dtype)
    return jax.nn.softmax(logits_BLE / temperature, axis=-1)


def unit_points(x_BLN: jax.Array) -> jax.Array:
    """Every vector scaled to length √N: its direction tells the task, its length only how plainly."""
    return x_BLN * jax.lax.rsqrt(jnp.mean(jnp.square(x_BLN), axis=-1, keepdims=True) + 1e-6)


def linear_gates(logits_BLE: jax.Array) -> jax.Array:
    """Signed gates of all experts: the normalized logits over √E; no softmax and no choice.

    Every gate is a coordinate that may point either way. The sum over E experts keeps its size whatever E is.
    """
    return logits_BLE * logits_BLE.shape[-1] ** -0.5


def gates_of(
    logits_BLE: jax.Array, routing: Routing, top_k: int, temperature: float = 1.0, key: jax.Array | None = None
) -> Gates:
    """Gates of any routing from its logits [B, L, E]; Gumbel noise where there is a key."""
    if routing == "linear":
        return Gates.of_all(linear_gates(logits_BLE))
    if routing == "keep_top_k":
        return keep_top_k(jax.nn.softmax(logits_BLE, axis=-1), top_k)
    soft_BLE = gumbel_softmax(logits_BLE, key, temperature)
    return Gates.of_all(soft_BLE) if routing == "gumbel" else keep_top_k(soft_BLE, top_k)


def straight_through(logits_BLE: jax.Array, routing: Routing, top_k: int, temperature: float = 1.0) -> Gates:
    """`gates_of` with a gradient for the experts that were not chosen, too.

    Renormalized gates of the K chosen experts say nothing about the others, which could then never come in. So all
    experts have to be computed, and the gradient is that of the softmax over all of them: a straight-through estimator
    (Bengio et al., 2013, arXiv:1308.3432).
    """
    if routing not in ("keep_top_k", "gumbel_top_k"):
        return gates_of(logits_BLE, routing, top_k, temperature)
    soft_BLE = gumbel_softmax(logits_BLE, None, temperature)
    return Gates.of_all(soft_BLE + jax.lax.stop_gradient(keep_top_k(soft_BLE, top_k).dense() - soft_BLE))


def cv_squared(gates_BLE: jax.Array) -> jax.Array:
    """CV² of the experts' importance, Var(importance) / mean(importance)², a scalar.

    importance_e is the sum of expert e's gates over the batch and the layers; the variance is unbiased. It is
    never computed as std², whose gradient at perfect balance is NaN. One expert has nothing to balance: 0.
    """
    importance_E = jnp.sum(gates_BLE, axis=(0, 1))
    if importance_E.shape[0] == 1:
        return jnp.zeros((), importance_E.dtype)
    return jnp.var(importance_E, ddof=1) / (jnp.mean(importance_E) ** 2 + 1e-10)


def gate_entropy(gates_BLE: jax.Array) -> jax.Array:
    """Entropy in nats of the experts' overall share, between 0 (one expert takes all) and log E (even use)."""
    share_E = jnp.sum(gates_BLE, axis=(0, 1))
    share_E = share_E / (jnp.sum(share_E) + 1e-10)
    return -jnp.sum(share_E * jnp.log(share_E + 1e-10))


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last, in fp32, with debiased running statistics.

    Flax's own starts its running variance at 1 and is two thirds that start after four steps. Here the running
    sums start at 0 and are divided by their total weight (as Adam's moments are), so they hold from the first step.
    A module that has seen no batch normalizes with mean 0 and variance 1.

    Attributes:
        momentum: share of the old value that a step keeps (0.9 here is 0.1 in PyTorch's sense).
        epsilon: added to the variance.
        bias_scale: standard deviation of the bias at the start. Signed gates start with a part that all prompts share;
            with 0 it would have to grow out of nothing.
        variance: which one the running statistics collect from a batch of n rows. A batch is normalized with its
            biased variance; that estimates the variance of what inference sees n / (n - 1) times too small, so the
            running one is unbiased, as PyTorch's. "biased" goes on with runs that began before this was so.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    bias_scale: float = 0.0
    variance: Variance = "unbiased"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[..., E] -> [..., E]; with `train`, statistics of this batch (of all hosts), else the running ones."""
        shape_out, E = x.shape, x.shape[-1]
        x = x.astype(float).reshape(-1, E)
        running = {
            name: self.variable("batch_stats", name, jnp.zeros, shape, float)
            for name, shape in (("mean", (E,)), ("var", (E,)), ("weight", ()))
        }
        scale = self.param("scale", nn.initializers.ones_init(), (E,))
        start = nn.initializers.normal(self.bias_scale) if self.bias_scale else nn.initializers.zeros_init()
        bias = self.param("bias", start, (E,))
        if train:
            mean = jnp.mean(x, axis=0)
            # Around the mean, not E[x²] - E[x]²: mean 100 and std 0.01 would come out as std 2.6.
            var = jnp.mean(jnp.square(x - mean[None]), axis=0)
            if not self.is_initializing():
                # Of one row the variance is 0, whatever the factor.
                rows, lost = x.shape[0], int(self.variance == "unbiased")
                collected = {"mean": mean, "var": var * (rows / max(rows - lost, 1)), "weight": jnp.ones(())}
                for name, new in collected.items():
                    running[name].value = self.momentum * running[name].value + (1 - self.momentum) * new
        else:
            weight = running["weight"].value
            seen = weight > 0
            mean = jnp.where(seen, running["mean"].value / jnp.where(seen, weight, 1.0), 0.0)
            var = jnp.where(seen, running["var"].value / jnp.where(seen, weight, 1.0), 1.0)
        x = (x - mean[None]) * jax.lax.rsqrt(var + self.epsilon)[None]
        return (x * scale[None] + bias[None]).reshape(shape_out)


class Standardize(nn.Module):
    """(x - mean) / deviation for every layer and feature, with statistics that are set once and never trained."""

    @nn.compact
    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        """[B, L, C] -> [B, L, C] in fp32; as it is before statistics were set."""
        shape = x_BLC.shape[1:]
        mean_LC = self.variable("batch_stats", "mean", jnp.zeros, shape, float).value
        deviation_LC = self.variable("batch_stats", "deviation", jnp.ones, shape, float).value
        return (x_BLC - mean_LC[None]) / deviation_LC[None]


class Router(nn.Module):
    """Meta tokens to gates: BatchNorm(f2(SiLU(f1(T)))), softmax, K largest kept and renormalized.

    f1 and f2 have no bias: BatchNorm cancels it, and AdamW would turn its rounding noise into full-size steps. Their
    products are small and exact: by default TPUs and GPUs round the operands of fp32 products to fewer bits, which
    turns near ties among experts.

    Attributes:
        num_experts: E.
        top_k: K gates of a row differ from zero ("keep_top_k" routing).
        width: hidden width H.
        routing: "keep_top_k"; "gumbel_top_k", the paper's ablation: `keep_top_k` of `gumbel_softmax`; "gumbel", without
            the choice of K: a soft mixture of all experts; or "linear", `linear_gates` of the logits.
        temperature: of both Gumbel routings.
        batch_norm: off only for ablation.
        by_layer: BatchNorm's statistics, scale and bias are each layer's own.
        heads: L, for a linear head of every layer behind f2, which then gives a point that the heads share; None for
            an f2 that gives the logits itself.
        point: N, the point's width; of no effect without heads.
        standardize: f1 reads (T - mean) / deviation, by layer and feature, and points are centered and scaled to
            length √N, with the fixed statistics that `lora_gen_jax.training.reader` has measured.
        train_reader: off, f1 and f2 stay as that stage left them.
        dropout: on what f1 reads.
        variance: as `BatchNorm.variance`.
    """

    num_experts: int
    top_k: int
    width: int
    routing: Routing = "keep_top_k"
    temperature: float = 1.0
    batch_norm: bool = True
    by_layer: bool = False
    heads: int | None = None
    point: int = 64
    standardize: bool = False
    train_reader: bool = True
    dropout: float = 0.0
    variance: Variance = "unbiased"

    def __call__(self, meta_BLC: jax.Array, train: bool = False) -> Gates:
        """[B, L, C] -> gates [B, L, K]. With `train`, Gumbel routing needs the rng "gumbel", dropout "dropout"."""
        return self.gates(self.logits(meta_BLC, train), train)

    @nn.compact
    def logits(self, meta_BLC: jax.Array, train: bool = False) -> jax.Array:
        """[B, L, C] -> what the gates are made of, [B, L, E] in fp32.

        Raises:
            ConfigError: for attributes out of range.
        """
        if self.routing not in get_args(Routing):
            raise ConfigError(
                f"a router's routing is {self.routing!r}; it must be one of {', '.join(get_args(Routing))}",
                field="generator.routing",
            )
        if not 1 <= self.top_k <= self.num_experts or self.temperature <= 0:
            raise ConfigError(
                f"a router has top_k = {self.top_k} of num_experts = {self.num_experts} and temperature ="
                f" {self.temperature}: top_k must lie between 1 and num_experts, temperature be positive",
                field="generator.top_k" if self.temperature > 0 else "generator.temperature",
            )
        logits_BLE = self._read(meta_BLC.astype(float), train)
        if self.heads is not None:
            by_head = nn.initializers.lecun_normal(batch_axis=(0,))
            heads = self.param("heads", by_head, (self.heads, self.point, self.num_experts))
            # One point for all layers (a prompt's pooled states), or one for each.
            point_BLN = jnp.broadcast_to(logits_BLE, (len(logits_BLE), self.heads, self.point))
            logits_BLE = jnp.einsum("bln,lne->ble", point_BLN, heads, precision="highest")
        if self.batch_norm:
            # By layer, a layer's expert is a feature of its own.
            features = logits_BLE.reshape(logits_BLE.shape[0], -1) if self.by_layer else logits_BLE
            start = 0.5 if self.routing == "linear" else 0.0
            norm = BatchNorm(bias_scale=start, variance=self.variance, name="norm")
            logits_BLE = norm(features, train).reshape(logits_BLE.shape)
        return logits_BLE

    def _read(self, x_BLC: jax.Array, train: bool) -> jax.Array:
        """f2(SiLU(f1(x))): logits [B, L, E], or points [B, L, N] where there are heads."""
        init = nn.initializers.lecun_normal()
        f1 = self.param("f1", init, (x_BLC.shape[-1], self.width))
        f2 = self.param("f2", init, (self.width, self.num_experts if self.heads is None else self.point))
        if self.standardize:
            x_BLC = Standardize(name="input")(x_BLC)
        if train and self.dropout > 0:
            x_BLC = nn.Dropout(self.dropout, deterministic=False)(x_BLC)
        hidden_BLH = jax.nn.silu(jnp.matmul(x_BLC, f1, precision="highest"))
        read_BLX = jnp.matmul(hidden_BLH, f2, precision="highest")
        if self.heads is not None and self.standardize:
            read_BLX = unit_points(Standardize(name="center")(read_BLX))
        return read_BLX if self.train_reader else jax.lax.stop_gradient(read_BLX)

    def gates(self, logits_BLE: jax.Array, train: bool = False) -> Gates:
        """Logits [B, L, E] -> gates [B, L, K]."""
        key = self.make_rng("gumbel") if train and self.routing in ("gumbel", "gumbel_top_k") else None
        return gates_of(logits_BLE, self.routing, self.top_k, self.temperature, key)
