"""The product with rounded operands, against float64, and what a step in mixed precision makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EDGE, SAME, random_params, token_rows
from jax.extend.core import jaxprs_in_params

from lora_gen_jax.decoder import layers
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.product import kept, product, product_beside

# Rounding to the nearest bf16 changes a number by this share of it at most; an fp32 sum of n products by n times the
# second.
U_BF16, U_FP32 = float(jnp.finfo(jnp.bfloat16).eps) / 2, float(jnp.finfo(jnp.float32).eps) / 2
# Both operands of a product.
BOTH = 2 * U_BF16 + U_BF16**2

SHAPES = {
    "one weight": ((2, 5, 48), (48, 24)),
    "a weight for each": ((3, 7, 48), (3, 48, 24)),
    "two batch axes": ((2, 3, 6, 32), (2, 3, 32, 5)),
}


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def double(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def bound(left, right):
    """What rounded operands and fp32 sums may change: elementwise, of left @ right."""
    return (BOTH + (left.shape[-1] + 2) * U_FP32 * (1 + BOTH)) * (np.abs(left) @ np.abs(right))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_value_and_gradients_agree_with_float64(shapes, stored):
    x, w = normal(0, shapes[0]), normal(1, shapes[1], stored)
    g = normal(2, (*shapes[0][:-1], shapes[1][-1]))
    y, pull = jax.vjp(lambda x, w: product(x, w, jnp.bfloat16), x, w)
    of_x, of_w = pull(g)
    assert (y.dtype, of_x.dtype, of_w.dtype) == (jnp.float32, jnp.float32, stored)
    x, w, g = double(x), double(w), double(g)
    assert np.all(np.abs(double(y) - x @ w) <= bound(x, w))
    turned = w.swapaxes(-1, -2)
    assert np.all(np.abs(double(of_x) - g @ turned) <= bound(g, turned))
    if w.ndim == 2:
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    expected, allowed = x.swapaxes(-1, -2) @ g, bound(x.swapaxes(-1, -2), g)
    once = U_BF16 if stored == jnp.bfloat16 else 0.0
    assert np.all(np.abs(double(of_w) - expected) <= allowed + once * (np.abs(expected) + allowed))


def test_results_are_not_rounded():
    x, w = normal(0, (64, 48)), normal(1, (48, 24))
    left, right = double(x.astype(jnp.bfloat16)), double(w.astype(jnp.bfloat16))
    allowed = 50 * U_FP32 * (np.abs(left) @ np.abs(right))
    assert np.all(np.abs(double(product(x, w, jnp.bfloat16)) - left @ right) <= allowed)


def test_without_operands_it_is_the_plain_product():
    with jax.enable_x64(True):
        x, w, g = (jnp.asarray(double(a)) for a in (normal(0, (5, 48)), normal(1, (48, 24)), normal(2, (5, 24))))
        y, pull = jax.vjp(product, x, w)
        expected, plain = jax.vjp(jnp.matmul, x, w)
        np.testing.assert_array_equal(y, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), pull(g), plain(g))


def test_the_gradient_of_a_trained_weight_keeps_what_bf16_activations_would_lose():
    """bf16 activations, an fp32 weight: 1 + 2^-10 is no bf16 number, and the sum of the gradient's terms."""
    x = jnp.asarray([[1.0], [2.0**-10]], jnp.bfloat16)
    of_w = jax.grad(lambda w: jnp.sum(product(x, w).astype(jnp.float32)))(jnp.ones((1, 1)))
    assert of_w.dtype == jnp.float32
    assert float(of_w[0, 0]) == 1 + 2.0**-10


@pytest.mark.parametrize("trained", [False, True])
def test_a_low_rank_path_beside_a_weight_is_the_sum_of_both(trained):
    """Values and gradients of x·w + h·b, to the rounding of sums in fp32: what is multiplied is the same."""
    x, w, h, b = normal(0, (2, 5, 48)), normal(1, (48, 64), jnp.bfloat16), normal(2, (2, 5, 6)), normal(3, (6, 64))
    g = normal(4, (2, 5, 64))

    def apart(x, w, h, b):
        return product(x, w, jnp.bfloat16) + product(h, b, jnp.bfloat16)

    def beside(x, w, h, b):
        return product_beside(x, w, h, b, jnp.bfloat16)

    def results(f):
        if trained:
            y, pull = jax.vjp(f, x, w, h, b)
        else:
            y, pull = jax.vjp(lambda x, h, b: f(x, w, h, b), x, h, b)
        return y, *pull(g)

    for ours, expected in zip(results(beside), results(apart), strict=True):
        assert ours.dtype == expected.dtype
        # Sums of up to 64 products of normal numbers; a weight's gradient is rounded to bf16 at the end.
        tolerance = 2 * U_BF16 if ours.dtype == jnp.bfloat16 else 0
        np.testing.assert_allclose(double(ours), double(expected), rtol=tolerance, atol=200 * U_FP32)


def test_frozen_weights_keep_no_activations():
    x, w = normal(0, (64, 48)), normal(1, (48, 24), jnp.bfloat16)
    _, pull = jax.vjp(lambda x: product(x, w, jnp.bfloat16), x)
    assert {leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size} == {w.shape}


def products_in(jaxpr):
    """Products of a jaxpr with no batch axes (linear layers'), loops counted once."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            count += not equation.params["dimension_numbers"][1][0]
        for inner in jaxprs_in_params(equation.params):
            count += products_in(inner)
    return count


@pytest.mark.parametrize("operands", [None, jnp.bfloat16])
def test_remat_keeps_the_products_of_linear_layers(operands):
    """Seven forward and seven backward; "full" computes six of them again (what `down` gave is not needed)."""
    params, x = random_params(EDGE), normal(0, (2, 6, EDGE.width))
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (2, 6))

    def count(remat):
        decoder = Decoder(EDGE, remat=remat, operands=operands)

        def total(x):
            hidden, _ = decoder.apply({"params": params}, x, positions, method="encode")
            return jnp.sum(hidden)

        return products_in(jax.make_jaxpr(jax.grad(total))(x).jaxpr)

    assert [count(remat) for remat in ("none", "dots", "full")] == [14, 14, 20]


def mean_loss(decoder, params, tokens):
    hidden, _ = decoder.apply({"params": params}, tokens[:, :-1])
    logits = decoder.apply({"params": params}, hidden, method="logits")
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))


def test_the_loss_differs_from_float32_by_what_its_products_round(monkeypatch):
    """To first order |ΔL| <= c·Σ |∂L/∂y|·(|x|·|w|) over all products y = x·w, with c = `BOTH`; the sum is measured.

    The bound is a sum of absolute values, far above what roundings of random signs do, which leaves room for the terms
    of second order.
    """
    params, tokens = random_params(EDGE), jnp.asarray(token_rows([12, 12, 12], EDGE.vocab_size))
    exact = mean_loss(Decoder(EDGE), params, tokens)
    mixed = mean_loss(Decoder(EDGE, operands=jnp.bfloat16), params, tokens)

    @jax.custom_vjp
    def tallied(x, w, share):
        return jnp.matmul(x, w)

    def backward(residuals, g):
        x, w = residuals
        size = jnp.sum(jnp.abs(g) * jnp.matmul(jnp.abs(x), jnp.abs(w)))
        return jnp.matmul(g, w.swapaxes(-1, -2)), _of_weight(x, w, g), size

    tallied.defvjp(lambda x, w, share: (jnp.matmul(x, w), (x, w)), backward)

    def counted(share):
        def stand_in(x, w, operands):
            return tallied(x, w.astype(jnp.float32), share)

        for module in ("layers", "attention", "model"):
            monkeypatch.setattr(f"lora_gen_jax.decoder.{module}.product", stand_in)
        return mean_loss(Decoder(EDGE, operands=jnp.float32), params, tokens)

    value, sensitivity = jax.value_and_grad(counted)(0.0)
    assert abs(float(value - exact)) <= 1e-5 * float(exact)  # every product was counted, and is the model's own
    allowed = BOTH * float(sensitivity)
    difference = abs(float(mixed - exact))
    assert 0 < difference <= allowed, (difference, allowed)
    assert allowed <= 0.2 * float(exact)  # a bound that says something


def _of_weight(x, w, g):
    if w.ndim == 2:
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return jnp.matmul(x.swapaxes(-1, -2), g)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("variant", [{}, {"remat": "dots"}, {"remat": "full"}, {"unroll": 3}])
def test_weights_stored_in_bf16_are_read_as_such(variant):
    """The rounded weights as bf16 and as fp32: the same numbers, so the same logits and gradients.

    What is between the products is float64, so that no two programs round an activation to another bf16 number.
    """
    params, x = random_params(EDGE), normal(0, (2, 6, EDGE.width), jnp.float64)
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (2, 6))
    decoder = Decoder(EDGE, operands=jnp.bfloat16, **variant)

    def matrices(tree, *types):
        def cast(path, value):
            for dtype in types if path[-1].key in ("kernel", "embedding") else ():
                value = value.astype(dtype)
            return value

        return jax.tree_util.tree_map_with_path(cast, tree)

    def values(params):
        def total(x):
            hidden, _ = decoder.apply({"params": params}, x, positions, method="encode")
            return jnp.sum(jnp.square(hidden[..., ::2])), hidden

        return jax.jit(jax.value_and_grad(total, has_aux=True))(x)

    stored, plain = (values(matrices(params, jnp.bfloat16, *last)) for last in ((), (jnp.float32,)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), stored, plain)


def test_kept_changes_nothing():
    x = normal(0, (3, 4))
    np.testing.assert_array_equal(kept(x), x)
    assert layers.kept is kept
