"""Router, gates and balance loss are a plain reading of the equations, written out here with loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import SAME, raises
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.router import BatchNorm, Gates, Router, cv_squared, gate_entropy, gumbel_softmax, keep_top_k

pytestmark = pytest.mark.float64
B, L, C, H, E = 3, 2, 5, 4, 4


def _meta(seed=0, shape=(B, L, C)):
    return np.random.default_rng(seed).standard_normal(shape)


def _variables(router, meta, seed=0):
    """Parameters with a BatchNorm that scales and shifts."""
    variables = router.init(jax.random.key(seed), meta)
    rng, features = np.random.default_rng(seed), variables["params"]["norm"]["scale"].size
    norm = {
        "scale": jnp.asarray(1 + rng.random(features)),
        "bias": jnp.asarray(rng.standard_normal(features)),
    }
    return {**variables, "params": {**variables["params"], "norm": norm}}


def applied(router, *args, **options):
    """As `router.apply`, the gates of all experts."""
    found = router.apply(*args, **options)
    return (found[0].dense(), found[1]) if "mutable" in options else found.dense()


def _plain_top_k(probabilities, k):
    """Equations 6 and 7 for one row: the first of equals wins."""
    kept = sorted(range(len(probabilities)), key=lambda e: (-probabilities[e], e))[:k]
    total = sum(probabilities[e] for e in kept) if k > 1 else 1.0
    return [probabilities[e] / total if e in kept else 0.0 for e in range(len(probabilities))]


def _plain_gates(params, meta, k, mean=None, var=None):
    """Equation 5 and what follows, in float64, one number at a time; and the rows' mean and unbiased variance."""
    f1, f2 = np.asarray(params["f1"], np.float64), np.asarray(params["f2"], np.float64)
    logits = np.zeros((*meta.shape[:2], f2.shape[1]))
    for b in range(meta.shape[0]):
        for layer in range(meta.shape[1]):
            hidden = []
            for j in range(f1.shape[1]):
                x = sum(float(meta[b, layer, i]) * f1[i, j] for i in range(f1.shape[0]))
                hidden.append(x / (1 + math.exp(-x)))
            for e in range(f2.shape[1]):
                logits[b, layer, e] = sum(hidden[j] * f2[j, e] for j in range(len(hidden)))
    rows = logits.reshape(-1, logits.shape[-1])
    if mean is None:
        mean = [sum(rows[:, e]) / len(rows) for e in range(rows.shape[1])]
        var = [sum((x - mean[e]) ** 2 for x in rows[:, e]) / len(rows) for e in range(rows.shape[1])]
    seen = (mean, np.array(var) * len(rows) / max(len(rows) - 1, 1))
    scale, bias = np.asarray(params["norm"]["scale"], np.float64), np.asarray(params["norm"]["bias"], np.float64)
    gates = []
    for row in rows:
        normed = [(row[e] - mean[e]) / math.sqrt(var[e] + 1e-5) * scale[e] + bias[e] for e in range(len(row))]
        weights = [math.exp(x) for x in normed]
        gates.append(_plain_top_k([w / sum(weights) for w in weights], k))
    return np.array(gates).reshape(logits.shape), seen


@pytest.mark.parametrize("k", [1, 2, 3, E])
def test_training_gates_are_the_equations_with_the_batchs_statistics(k):
    router, meta = Router(num_experts=E, top_k=k, width=H), _meta()
    variables = _variables(router, meta)
    gates, _ = applied(router, variables, meta, True, mutable=["batch_stats"])
    expected, _ = _plain_gates(variables["params"], meta, k)
    np.testing.assert_allclose(gates, expected, **SAME)


def test_inference_gates_are_the_equations_with_debiased_running_statistics():
    router, k = Router(num_experts=E, top_k=2, width=H), 2
    variables = _variables(router, _meta())
    mean, var, weight = np.zeros(E), np.zeros(E), 0.0
    for step in range(4):
        meta = _meta(step) * (1 + step)
        _, updates = applied(router, variables, meta, True, mutable=["batch_stats"])
        variables = {**variables, **updates}
        _, (batch_mean, batch_var) = _plain_gates(variables["params"], meta, k)
        mean, var = 0.9 * mean + 0.1 * np.array(batch_mean), 0.9 * var + 0.1 * np.array(batch_var)
        weight = 0.9 * weight + 0.1
    meta = _meta(9, (1, L, C))
    expected, _ = _plain_gates(variables["params"], meta, k, mean / weight, var / weight)
    np.testing.assert_allclose(applied(router, variables, meta), expected, **SAME)


def test_one_training_step_makes_inference_on_the_same_batch_the_same():
    """Running statistics that kept a share of their start (mean 0, variance 1) would not; with the batch's own
    variance, not the estimate of what others of its kind have."""
    router, meta = Router(num_experts=E, top_k=2, width=H, variance="biased"), 50 * _meta()
    variables = _variables(router, meta)
    gates, updates = applied(router, variables, meta, True, mutable=["batch_stats"])
    np.testing.assert_allclose(applied(router, {**variables, **updates}, meta), gates, **SAME)


def test_inference_before_any_training_step_is_finite_and_uses_mean_0_and_variance_1():
    router, meta = Router(num_experts=E, top_k=2, width=H), _meta()
    variables = _variables(router, meta)
    expected, _ = _plain_gates(variables["params"], meta, 2, np.zeros(E), np.ones(E))
    np.testing.assert_allclose(applied(router, variables, meta), expected, **SAME)


def test_initialization_counts_as_no_batch():
    variables = Router(num_experts=E, top_k=2, width=H).init(jax.random.key(0), _meta(), True)
    assert all(not np.any(x) for x in jax.tree.leaves(variables["batch_stats"]))


def test_a_row_of_a_single_prompt_does_not_depend_on_its_neighbours_at_inference():
    router, meta = Router(num_experts=E, top_k=2, width=H), _meta()
    variables = _variables(router, meta)
    _, updates = applied(router, variables, meta, True, mutable=["batch_stats"])
    variables = {**variables, **updates}
    together = applied(router, variables, meta)
    alone = jnp.concatenate([applied(router, variables, meta[b : b + 1]) for b in range(B)])
    np.testing.assert_allclose(together, alone, **SAME)


def test_statistics_by_layer_are_those_of_a_router_that_sees_that_layer_alone():
    """Equal f1 and f2: in each layer the gates are those of a batch that has no other layer."""
    router, meta = Router(num_experts=E, top_k=2, width=H, by_layer=True, variance="biased"), 3 * _meta()
    variables = _variables(router, meta)
    norm = variables["params"]["norm"]
    assert norm["scale"].shape == (L * E,)
    gates, updates = applied(router, variables, meta, True, mutable=["batch_stats"])
    trained = {**variables, **updates}
    for layer in range(L):
        own = {name: values.reshape(L, E)[layer] for name, values in norm.items()}
        expected, _ = _plain_gates({**variables["params"], "norm": own}, meta[:, layer : layer + 1], 2)
        np.testing.assert_allclose(gates[:, layer : layer + 1], expected, **SAME)
    np.testing.assert_allclose(applied(router, trained, meta), gates, **SAME)
    np.testing.assert_allclose(applied(router, trained, meta[:1]), gates[:1], **SAME)


def test_router_without_batch_norm_takes_the_softmax_of_the_logits():
    router, meta = Router(num_experts=E, top_k=E, width=H, batch_norm=False), _meta()
    variables = router.init(jax.random.key(0), meta)
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"f1", "f2"}
    params = {**variables["params"], "norm": {"scale": np.ones(E), "bias": np.zeros(E)}}
    # Variance 1 - 1e-5 makes the reference's normalization the identity.
    expected, _ = _plain_gates(params, meta, E, np.zeros(E), np.full(E, 1 - 1e-5))
    np.testing.assert_allclose(applied(router, variables, meta), expected, **SAME)


def test_batch_statistics_are_those_of_torch_and_flax():
    torch = pytest.importorskip("torch")
    x = 3 + 2 * _meta(4, (B, L, E))
    variables = BatchNorm().init(jax.random.key(0), x, True)
    ours, updates = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    norm = torch.nn.BatchNorm1d(E, eps=1e-5, momentum=0.1, dtype=torch.float64)
    theirs = norm(torch.tensor(x.reshape(-1, E))).detach().numpy()
    np.testing.assert_allclose(np.asarray(ours).reshape(-1, E), theirs, **SAME)
    flax_norm = nn.BatchNorm(use_running_average=False, momentum=0.9, use_fast_variance=False)
    # Its start is float32, in which 0.9 times the variance 1 would be rounded.
    start = jax.tree.map(lambda value: value.astype(float), flax_norm.init(jax.random.key(0), x))
    theirs, flax_updates = flax_norm.apply(start, x, mutable=["batch_stats"])
    np.testing.assert_allclose(ours, theirs, **SAME)
    # Flax starts at (0, 1) and keeps 0.9 of that; ours starts at 0 and counts its weight.
    stats, other = updates["batch_stats"], flax_updates["batch_stats"]
    np.testing.assert_allclose(stats["mean"], other["mean"], **SAME)
    np.testing.assert_allclose(stats["var"], (other["var"] - 0.9) * (B * L) / (B * L - 1), **SAME)
    np.testing.assert_allclose(stats["weight"], 0.1, **SAME)


@pytest.mark.parametrize("rows", [2, 3, 16])
def test_inference_after_batches_of_few_rows_is_torchs(rows):
    """Torch's start (mean 0, variance 1, of weight 0.9 to the number of steps) taken out, as ours never has it."""
    torch = pytest.importorskip("torch")
    batches, x = [5 + 3 * _meta(step, (rows, E)) for step in range(4)], _meta(9, (7, E))
    theirs = torch.nn.BatchNorm1d(E, eps=1e-5, momentum=0.1, dtype=torch.float64)
    variables = BatchNorm().init(jax.random.key(0), x, True)
    for batch in batches:
        theirs(torch.tensor(batch))
        variables |= BatchNorm().apply(variables, batch, True, mutable=["batch_stats"])[1]
    start = 0.9 ** len(batches)
    theirs.running_mean /= 1 - start
    theirs.running_var.sub_(start).div_(1 - start)
    expected = theirs.eval()(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(BatchNorm().apply(variables, x, False), expected, **SAME)


def test_the_biased_variance_is_that_of_the_rows_themselves():
    batches = [_meta(step, (3, E)) for step in range(2)]
    norm = BatchNorm(variance="biased")
    variables = norm.init(jax.random.key(0), batches[0], True)
    for batch in batches:
        variables |= norm.apply(variables, batch, True, mutable=["batch_stats"])[1]
    expected = 0.09 * batches[0].var(0) + 0.1 * batches[1].var(0)
    np.testing.assert_allclose(variables["batch_stats"]["var"], expected, **SAME)


def test_a_batch_of_one_row_has_no_variance_and_leaves_the_statistics_finite():
    x = _meta(0, (1, E))
    variables = BatchNorm().init(jax.random.key(0), x, True)
    _, updates = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_array_equal(updates["batch_stats"]["var"], np.zeros(E))


def test_gradients_through_batch_norm_are_torchs():
    torch = pytest.importorskip("torch")
    x, pull = _meta(4, (B, L, E)), _meta(5, (B, L, E))
    variables = BatchNorm().init(jax.random.key(0), x, True)
    ours = jax.grad(lambda x: jnp.sum(BatchNorm().apply(variables, x, True, mutable=["batch_stats"])[0] * pull))(x)
    inputs = torch.tensor(x.reshape(-1, E), requires_grad=True)
    (torch.nn.BatchNorm1d(E, dtype=torch.float64)(inputs) * torch.tensor(pull.reshape(-1, E))).sum().backward()
    np.testing.assert_allclose(np.asarray(ours).reshape(-1, E), inputs.grad.numpy(), **SAME)


def test_a_large_mean_does_not_swallow_a_small_variance():
    rng = np.random.default_rng(0)
    x = (100 + 0.01 * rng.standard_normal((64, 2, 3))).astype(np.float32)
    with jax.enable_x64(False):  # float64 would hide it
        variables = BatchNorm().init(jax.random.key(0), x, True)
        y, _ = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    exact = x.astype(np.float64).reshape(-1, 3)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    # fp32 holds 100.01 to 8e-6, a hundredth of 0.01's standard deviation over √(0.01² + 1e-5) = 0.0105.
    np.testing.assert_allclose(np.asarray(y).reshape(-1, 3), expected, atol=8e-6 / 0.0105 * 2)
    assert abs(float(np.std(y)) - float(np.std(expected))) < 1e-3


@given(hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-20, 20, width=32)), st.integers(min_value=1, max_value=5))
@settings(max_examples=60, deadline=None)
def test_every_row_keeps_exactly_k_gates_that_sum_to_one(logits, k):
    probabilities = jax.nn.softmax(jnp.asarray(logits), axis=-1)
    gates = np.asarray(keep_top_k(probabilities, k).dense())
    p = np.asarray(probabilities)
    # A probability of e^-40 is still a positive fp32 number, so the K kept ones are the K non-zero ones.
    assert np.all(np.sum(gates > 0, axis=-1) == k)
    assert np.all(gates >= 0)
    if k > 1:
        # Five fp32 quotients below 1 and their sum: at most nine roundings by 2^-24.
        np.testing.assert_allclose(gates.sum(-1), 1, atol=9 * 2.0**-24)
    else:
        np.testing.assert_array_equal(gates.sum(-1), p.max(-1))
    assert np.all(np.where(gates > 0, p, np.inf).min(-1) >= np.where(gates > 0, -np.inf, p).max(-1))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_chosen_gates_are_the_dense_ones_without_their_zeros(array):
    index, weight = np.array([[3, 0], [1, 2]], np.uint8), np.array([[0.75, 0.25], [0.5, 0.5]])
    gates = Gates(array(index), array(weight), 4)
    expected = np.array([[0.25, 0, 0, 0.75], [0, 0.5, 0.5, 0]])
    np.testing.assert_array_equal(gates.dense(), expected)
    assert (gates.shape, gates.active) == ((2, 4), 2)
    whole = Gates.of_all(array(expected))
    assert (whole.dense() is whole.weight, whole.shape, whole.active) == (True, (2, 4), 4)
    # One row's share of values by expert, summed: the same either way.
    values = np.arange(8.0).reshape(4, 2)
    for row in range(2):
        one, of_all = (jax.tree.map(lambda x, row=row: x[row], each) for each in (gates, whole))
        sums = [np.asarray(each.weight) @ np.asarray(each.chosen(values)) for each in (one, of_all)]
        np.testing.assert_allclose(*sums, rtol=1e-12)
    (by_layer,) = jax.tree.map(lambda x: x[None], gates).by_layer().dense().swapaxes(0, 1)
    np.testing.assert_array_equal(by_layer, expected)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_tie_keeps_exactly_k(k):
    gates = np.asarray(keep_top_k(jnp.full((1, 1, 4), 0.25), k).dense())
    assert np.count_nonzero(gates) == k
    np.testing.assert_allclose(gates[gates > 0], 0.25 if k == 1 else 1 / k)


def test_one_kept_expert_keeps_its_probability_and_teaches_the_router():
    router, meta = Router(num_experts=E, top_k=1, width=H), _meta()
    variables = _variables(router, meta)

    def total(params):
        return jnp.sum(applied(router, {**variables, "params": params}, meta))

    assert np.all(np.asarray(applied(router, variables, meta)).max(-1) < 1)
    gradient = jax.grad(total)(variables["params"])
    assert all(np.max(np.abs(g)) > 1e-4 for g in jax.tree.leaves(gradient))


def _plain_cv(gates):
    importance = [
        sum(float(gates[b][layer][e]) for b in range(len(gates)) for layer in range(len(gates[0])))
        for e in range(len(gates[0][0]))
    ]
    mean = sum(importance) / len(importance)
    return sum((x - mean) ** 2 for x in importance) / (len(importance) - 1) / (mean**2 + 1e-10)


def test_cv_is_the_unbiased_variance_of_importance_over_its_squared_mean():
    gates = np.random.default_rng(0).random((B, L, E))
    np.testing.assert_allclose(cv_squared(jnp.asarray(gates)), _plain_cv(gates), **SAME)
    # By hand: importance (3, 1), mean 2, unbiased variance 2.
    assert float(cv_squared(jnp.array([[[1.0, 1.0]], [[2.0, 0.0]]]))) == pytest.approx(0.5)


def test_cv_at_perfect_balance_is_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(cv_squared)(jnp.full((2, 3, 4), 0.25))
    assert float(value) == pytest.approx(0, abs=1e-12)
    assert np.all(np.isfinite(gradient))


def test_cv_of_a_single_expert_is_zero():
    value, gradient = jax.value_and_grad(cv_squared)(jnp.ones((2, 3, 1)))
    assert float(value) == 0
    assert not np.any(gradient)


def test_cv_of_gates_that_are_all_zero_is_finite():
    value, gradient = jax.value_and_grad(cv_squared)(jnp.zeros((2, 3, 4)))
    assert float(value) == 0
    assert np.all(np.isfinite(gradient))


def test_gate_entropy_lies_between_one_expert_and_even_use():
    assert float(gate_entropy(jnp.full((2, 3, 4), 0.25))) == pytest.approx(math.log(4), abs=1e-5)
    one = jnp.zeros((2, 3, 4)).at[..., 1].set(1.0)
    assert float(gate_entropy(one)) == pytest.approx(0, abs=1e-5)


def test_gumbel_gates_mix_all_experts_and_draw_noise_in_training_alone():
    router, meta = Router(num_experts=E, top_k=2, width=H, routing="gumbel", temperature=0.7), _meta()
    keys = {"params": jax.random.key(0), "gumbel": jax.random.key(1)}
    variables = router.init(keys, meta, True)

    def train(seed):
        return applied(router, variables, meta, True, rngs={"gumbel": jax.random.key(seed)}, mutable=["batch_stats"])[0]

    calm, noisy = applied(router, variables, meta), train(1)
    for gates in (calm, noisy):
        np.testing.assert_allclose(np.sum(gates, axis=-1), 1, **SAME)
        assert np.all(np.asarray(gates) > 0)
    np.testing.assert_array_equal(applied(router, variables, meta), calm)
    np.testing.assert_array_equal(train(1), noisy)
    assert np.max(np.abs(train(2) - noisy)) > 0.01


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gumbel_top_k_is_the_soft_gates_of_the_same_noise_with_the_k_largest_kept(k):
    """In training and, with no noise, at inference; the K largest by the loop above."""
    meta, changes = _meta(), {"num_experts": E, "top_k": k, "width": H, "temperature": 0.7}
    router, soft = Router(routing="gumbel_top_k", **changes), Router(routing="gumbel", **changes)
    variables = _variables(soft, meta)

    def gates(router, train, seed=1):
        rngs, mutable = {"gumbel": jax.random.key(seed)}, ["batch_stats"]
        return np.asarray(applied(router, variables, meta, train, rngs=rngs, mutable=mutable)[0])

    for train in (True, False):
        expected = np.array([[_plain_top_k(list(row), k) for row in prompt] for prompt in gates(soft, train)])
        np.testing.assert_allclose(gates(router, train), expected, **SAME)
        assert np.all(np.count_nonzero(gates(router, train), axis=-1) == k)
    chosen = [gates(router, True, seed) > 0 for seed in range(4)]
    assert any(np.any(one != chosen[0]) for one in chosen[1:])
    np.testing.assert_array_equal(gates(router, False, 1), gates(router, False, 2))


def test_gumbel_top_k_draws_experts_without_replacement():
    """The two of the largest noised logits are i and j with probability pi·pj/(1 - pi) + pj·pi/(1 - pj)."""
    logits, count = np.array([0.0, 1.0, -1.0], np.float32), 20_000
    soft = gumbel_softmax(jnp.asarray(np.broadcast_to(logits, (1, count, 3))), jax.random.key(0), 0.5)
    gates = np.asarray(keep_top_k(soft, 2).dense())[0]
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    for left_out in range(3):
        i, j = (e for e in range(3) if e != left_out)
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        # Three standard errors of a share of 20,000 draws.
        assert abs(np.mean(gates[:, left_out] == 0) - expected) < 3 * math.sqrt(0.25 / count)


def test_gumbel_softmax_without_noise_divides_by_the_temperature():
    logits = np.array([[[1.0, 0.5, -2.0]]])
    weights = np.exp(logits[0, 0].astype(np.float64) / 0.5)
    np.testing.assert_allclose(gumbel_softmax(logits, None, 0.5)[0, 0], weights / weights.sum(), **SAME)


def test_gumbel_noise_follows_the_softmaxs_distribution():
    """The arg max of logits plus Gumbel noise falls on an expert with the softmax's probability."""
    logits = np.broadcast_to(np.array([0.0, 1.0, -1.0], np.float32), (1, 20_000, 3))
    drawn = np.argmax(gumbel_softmax(jnp.asarray(logits), jax.random.key(0), 1.0), axis=-1)
    share = np.bincount(drawn[0], minlength=3) / drawn.size
    expected = np.exp([0, 1, -1]) / np.sum(np.exp([0, 1, -1]))
    # Three standard errors of a share of 20,000 draws.
    np.testing.assert_allclose(share, expected, atol=3 * math.sqrt(0.25 / 20_000))


@pytest.mark.parametrize(
    ("changes", "field", "facts"),
    [
        ({"routing": "topk"}, "generator.routing", ("'topk'", "keep_top_k, gumbel_top_k, gumbel")),
        ({"top_k": 0}, "generator.top_k", (0, 4)),
        ({"top_k": 5}, "generator.top_k", (5, 4)),
        ({"routing": "gumbel", "temperature": 0.0}, "generator.temperature", ("0.0",)),
    ],
)
def test_a_router_out_of_range_is_refused(changes, field, facts):
    router = Router(**({"num_experts": 4, "top_k": 2, "width": 3} | changes))
    with raises(ConfigError, field, *facts):
        router.init(jax.random.key(0), jnp.ones((2, 3, 5)))
