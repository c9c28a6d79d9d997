"""LoRA-Gen's pieces inside a Linen model that knows nothing of this package.

Somebody has an MLP that was trained on waves a·sin(x + φ) of all amplitudes and phases at once, so that it has learned
their average. A generator reads ten points of one wave (its "prompt"), a router turns what it read into gates over a
pool of LoRA experts, and the gated products are added to the MLP's own kernels: a specialist for a wave never seen.

In: nothing. Out: the error of the MLP as it is and specialized, on waves that were not trained on.

Command:  python examples/own_model.py        (half a minute on two CPU cores)
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lora_gen_jax import ExpertPool, Router, cv_squared, gated_product

WIDTH, POINTS, EXPERTS, RANK, TOP_K = 64, 10, 16, 8, 8
HIDDEN = ("hidden_0", "hidden_1")


class Theirs(nn.Module):
    """The model that is specialized: plain Linen, with parameters called as its author likes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name in HIDDEN:
            x = nn.tanh(nn.Dense(WIDTH, name=name)(nn.Dense(WIDTH)(x) if name == HIDDEN[0] else x))
        return nn.Dense(1, name="out")(x)


class Generator(nn.Module):
    """Points of a wave [P, N, 2] -> gates [P, L, E] and the pool {"kernel": {"a": [E, D, R], "b": [E, R, F]}}."""

    @nn.compact
    def __call__(self, points_PN2: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        h = nn.silu(nn.Dense(128)(nn.silu(nn.Dense(128)(points_PN2)))).mean(axis=1)
        # One token for each layer that is to be changed.
        meta_PLC = nn.Dense(len(HIDDEN) * 64)(h).reshape(len(h), len(HIDDEN), 64)
        gates = Router(num_experts=EXPERTS, top_k=TOP_K, width=64)(meta_PLC, train)
        return gates.dense(), ExpertPool({"kernel": (WIDTH, WIDTH)}, EXPERTS, RANK)()


def specialize(params: Any, gates_LE: jax.Array, pool: Any) -> Any:
    """The author's parameters with equation 8 added: a tree of the same shape, for the same `apply`."""
    changed = dict(params)
    for gates_E, name in zip(gates_LE, HIDDEN, strict=True):
        delta = gated_product(gates_E, pool["kernel"]["a"], pool["kernel"]["b"], 1.0)
        changed[name] = {**params[name], "kernel": params[name]["kernel"] + delta}
    return changed


def waves(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Points (x, y) of `count` waves to read, and others to answer, each [P, N, 2]."""
    keys = jax.random.split(key, 3)
    amplitude, phase = jax.random.uniform(keys[0], (2, count, 1)) * jnp.array([4.9, jnp.pi])[:, None, None]
    x = jax.random.uniform(keys[1], (count, 3 * POINTS), minval=-5.0, maxval=5.0)
    points = jnp.stack([x, (0.1 + amplitude) * jnp.sin(x + phase)], axis=-1)
    return points[:, :POINTS], points[:, POINTS:]


def errors(params: Any, generator: Any, variables: Any, key: jax.Array) -> tuple[float, float]:
    """Mean squared error on waves, of the model as it is and specialized."""
    read, asked = waves(key, 500)
    gates_PLE, pool = generator.apply(variables, read, False)

    def error(gates_LE: jax.Array, points: jax.Array) -> jax.Array:
        x, y = points[:, :1], points[:, 1:]
        models = (params, specialize(params, gates_LE, pool))
        return jnp.stack([jnp.mean((Theirs().apply({"params": p}, x) - y) ** 2) for p in models])

    base, specialized = jnp.mean(jax.vmap(error)(gates_PLE, asked), axis=0)
    return float(base), float(specialized)


def pretrained(steps: int) -> Any:
    """The author's model: the average of all waves."""
    model, tx = Theirs(), optax.adam(3e-3)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1)))["params"]

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        _, points = waves(key, 64)
        x, y = points[..., :1].reshape(-1, 1), points[..., 1:].reshape(-1, 1)
        gradients = jax.grad(lambda p: jnp.mean((model.apply({"params": p}, x) - y) ** 2))(params)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return params


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    steps = parser.parse_args(arguments).steps
    params, generator = pretrained(min(steps, 500)), Generator()
    variables = generator.init(jax.random.key(1), waves(jax.random.key(0), 2)[0], False)
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(variables: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        read, asked = waves(key, 64)

        def loss(trained: Any) -> tuple[jax.Array, Any]:
            everything = {"params": trained, "batch_stats": variables["batch_stats"]}
            (gates_PLE, pool), updated = generator.apply(everything, read, True, mutable=["batch_stats"])

            def error(gates_LE: jax.Array, points: jax.Array) -> jax.Array:
                says = Theirs().apply({"params": specialize(params, gates_LE, pool)}, points[:, :1])
                return jnp.mean((says - points[:, 1:]) ** 2)

            return jnp.mean(jax.vmap(error)(gates_PLE, asked)) + 0.01 * cv_squared(gates_PLE), updated

        gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(gradients, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **updated}, state

    state, key = tx.init(variables["params"]), jax.random.key(2)
    for i in range(steps):
        variables, state = step(variables, state, jax.random.fold_in(key, i))
    base, specialized = errors(params, generator, variables, jax.random.key(3))
    print(
        f"mean squared error on 500 waves that were not trained on: {base:.3f} as it is, {specialized:.3f} specialized"
    )
    return base, specialized


if __name__ == "__main__":
    main()
