"""Merged weights say what the side path says, for every mergeable method; the base comes back."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import EDGE, OPT, SAME, logits, noise_like, raises, random_params, token_rows

from lora_gen_jax.adapters import gated_pool as gated_pool_module
from lora_gen_jax.adapters import merge as merging
from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.lora import LoRA, PromptLoRA, dropout
from lora_gen_jax.adapters.merge import merge, merge_donated, merge_over, unmerge, unmerge_donated
from lora_gen_jax.decoder.layers import Linear
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.product import product
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.router import Gates, keep_top_k
from lora_gen_jax.models import init_params
from lora_gen_jax.sharding import make_mesh, param_shardings

pytestmark = pytest.mark.float64
# ΔW is of the weights' own order, so that an error in it cannot hide.
# More than 2K experts: with fewer all would be computed.
E, R, P = 5, 3, 2


def _pair(rng, lead, inputs, outputs):
    return {
        "a": jnp.asarray(0.4 * rng.standard_normal((*lead, inputs, R))),
        "b": jnp.asarray(0.4 * rng.standard_normal((*lead, R, outputs))),
    }


def gated_pool(config, pool="shared", mix="products", top_k=2, gumbel=False, seed=0):
    rng, layers = np.random.default_rng(seed), config.num_layers
    lead = (layers, E) if pool == "per_layer" else (E,)
    experts = {site: _pair(rng, lead, *config.site_shape(site)) for site in config.ffn_sites}
    weights = jnp.asarray(rng.random((layers, P, E)) + 0.05)
    gates = Gates.of_all(weights / weights.sum(-1, keepdims=True)) if gumbel else keep_top_k(weights, top_k)
    scanned = {"gates": gates, "pool": experts} if pool == "per_layer" else {"gates": gates}
    shared = None if pool == "per_layer" else {"pool": experts}
    return GatedPool(scanned, shared, scale=1.5, mix=mix, dropout_rate=0.3)


def prompt_lora(config, seed=0):
    rng = np.random.default_rng(seed)
    factors = {site: _pair(rng, (config.num_layers, P), *config.site_shape(site)) for site in config.ffn_sites}
    return PromptLoRA(factors, scale=1.5, dropout_rate=0.3)


def lora(config, seed=0):
    rng = np.random.default_rng(seed)
    sites = ("q", "v", *config.ffn_sites)
    return LoRA({s: _pair(rng, (config.num_layers,), *config.site_shape(s)) for s in sites}, scale=1.5)


ADAPTERS = {
    "shared products K=2": gated_pool,
    "shared products K=E": lambda c: gated_pool(c, top_k=E),
    "shared factors K=2": lambda c: gated_pool(c, mix="factors"),
    "per-layer products K=2": lambda c: gated_pool(c, pool="per_layer"),
    "per-layer factors K=2": lambda c: gated_pool(c, pool="per_layer", mix="factors"),
    "gumbel products": lambda c: gated_pool(c, gumbel=True),
    "gumbel factors": lambda c: gated_pool(c, mix="factors", gumbel=True),
    "direct": prompt_lora,
    "lora": lora,
}
TOKENS = np.asarray(token_rows([9] * 4, EDGE.vocab_size), np.int32)


def copied(params):
    """Copies: `np.asarray` shows the same memory, and holding it keeps JAX from donating it."""
    return jax.tree.map(lambda x: np.array(x, copy=True), params)


def single(adapter, prompt=0):
    return adapter if isinstance(adapter, LoRA) else adapter.select(prompt)


@pytest.fixture(scope="module")
def params_of():
    made = {}
    return lambda config: made.setdefault(config.family, random_params(config))


def plain_delta(adapter, site, layer, prompt):
    """ΔW from the equations in float64, one expert at a time."""
    scanned, scale = adapter.scanned, adapter.scale
    if not isinstance(adapter, GatedPool):
        a, b = (np.asarray(scanned[site][k], np.float64)[layer] for k in ("a", "b"))
        return scale * (a @ b if isinstance(adapter, LoRA) else a[prompt] @ b[prompt])
    pool = scanned["pool"] if adapter.shared is None else adapter.shared["pool"]
    a, b = (np.asarray(pool[site][k], np.float64) for k in ("a", "b"))
    if adapter.shared is None:
        a, b = a[layer], b[layer]
    gates = np.asarray(scanned["gates"].dense(), np.float64)[layer, prompt]
    if adapter.mix == "factors":
        return scale * np.tensordot(gates, a, axes=1) @ np.tensordot(gates, b, axes=1)
    return scale * sum(g * (x @ y) for g, x, y in zip(gates, a, b, strict=True))


# OPT has no gate: the same code for two sites instead of three.
CASES = [(name, EDGE) for name in ADAPTERS] + [(name, OPT) for name in ("shared products K=2", "lora")]


@pytest.mark.parametrize(("name", "config"), CASES, ids=[f"{name} {c.family}" for name, c in CASES])
def test_the_merged_model_says_what_the_side_path_says(params_of, name, config):
    """Rows of both prompts at once through the side path, each prompt's own merged weights on its rows."""
    adapter, params, decoder = ADAPTERS[name](config), params_of(config), Decoder(config)
    side = np.asarray(logits(decoder, params, TOKENS, adapter=adapter))
    base = np.asarray(logits(decoder, params, TOKENS))
    assert np.max(np.abs(side - base)) > 0.1
    for prompt in range(P):
        rows = slice(2 * prompt, 2 * prompt + 2)
        merged = logits(decoder, merge(params, single(adapter, prompt)), TOKENS[rows])
        np.testing.assert_allclose(merged, side[rows], **SAME)


@pytest.mark.parametrize(("name", "config"), CASES, ids=[f"{name} {c.family}" for name, c in CASES])
def test_merging_adds_the_equations_delta_to_the_sites_of_the_method_alone(params_of, name, config):
    adapter, params = ADAPTERS[name](config), params_of(config)
    merged = merge(params, single(adapter, 1))
    changed = {"q", "v", *config.ffn_sites} if isinstance(adapter, LoRA) else set(config.ffn_sites)
    for group in ("attention", "ffn"):
        for site, leaf in params["layers"][group].items():
            new = merged["layers"][group][site]
            if site not in changed:
                np.testing.assert_array_equal(new["kernel"], leaf["kernel"])
                continue
            for layer in range(config.num_layers):
                expected = np.asarray(leaf["kernel"][layer], np.float64) + plain_delta(adapter, site, layer, 1)
                np.testing.assert_allclose(new["kernel"][layer], expected, **SAME)
            if "bias" in leaf:
                np.testing.assert_array_equal(new["bias"], leaf["bias"])
    rest = [k for k in params["layers"] if k not in ("attention", "ffn")]
    assert all(params["layers"][k] is merged["layers"][k] or jax.tree.all(jax.tree.map(
        np.array_equal, params["layers"][k], merged["layers"][k])) for k in rest)  # fmt: skip


def test_mixed_factors_add_the_cross_terms_of_the_experts():
    """(Σ G·A)·(Σ G·B) - Σ G·A·B = Σ_{i≠j} G_i·G_j·A_i·B_j + Σ (G²-G)·A·B, beside the token and merged."""
    adapter, x_BTD = gated_pool(EDGE).select(0), noise_like(np.zeros((1, 5, EDGE.width)), 1)
    layer = adapter.replace(scanned=jax.tree.map(lambda x: x[0], adapter.scanned))
    mixed = layer.replace(mix="factors")
    gates, (a, b) = np.asarray(layer.gates.dense()[0]), (np.asarray(adapter.pool["up"][k]) for k in ("a", "b"))
    pairs = np.outer(gates, gates) - np.diag(gates)
    cross = adapter.scale * sum(pairs[i, j] * a[i] @ b[j] for i in range(E) for j in range(E))
    assert np.max(np.abs(cross)) > 0.05
    np.testing.assert_allclose(mixed.weight_delta("up") - layer.weight_delta("up"), cross, **SAME)
    beside = mixed.delta("up", x_BTD, None) - layer.delta("up", x_BTD, None)
    np.testing.assert_allclose(beside, np.asarray(x_BTD) @ cross, **SAME)


@pytest.mark.parametrize("name", ["shared products K=2", "per-layer factors K=2", "lora"])
def test_weights_stored_in_bf16_are_rounded_once_after_an_exact_sum(params_of, name):
    adapter = ADAPTERS[name](EDGE)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(EDGE))
    merged = merge(params, single(adapter))
    for site in EDGE.ffn_sites:
        kernel = np.asarray(params["layers"]["ffn"][site]["kernel"]).astype(np.float64)
        got = np.asarray(merged["layers"]["ffn"][site]["kernel"])
        assert got.dtype == ml_dtypes.bfloat16
        exact = np.stack([kernel[i] + plain_delta(adapter, site, i, 0) for i in range(EDGE.num_layers)])
        rounded = exact.astype(np.float32).astype(ml_dtypes.bfloat16)
        # Half of bf16's 2^-8. Rounding to fp32 on the way may fall on the other side now and then; sums in bf16 nearly
        # always.
        assert np.mean(got != rounded) < 2e-3
        error = np.abs(got.astype(np.float64) - exact)
        assert np.all(error <= np.abs(exact) * 2.0**-8 * 1.001 + 1e-6)


@pytest.mark.parametrize("name", ["shared products K=2", "per-layer products K=2", "direct"])
def test_the_base_stays_as_it_was_and_subtraction_returns_to_it_within_rounding(params_of, name):
    adapter, params = single(ADAPTERS[name](EDGE)), params_of(EDGE)
    before = copied(params)
    merged = merge(params, adapter)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    back = unmerge(merged, adapter)
    # Weights and ΔW are below 8: half a unit in the last place of float64, twice.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=8 * 2.0**-52), back, params)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_donated_merging_gives_the_same_bits_and_consumes_its_input(params_of):
    adapter, params = single(gated_pool(EDGE)), params_of(EDGE)
    kept = merge(params, adapter)
    copy = jax.tree.map(jnp.copy, params)
    donated = merge_donated(copy, adapter)
    jax.tree.map(np.testing.assert_array_equal, donated, kept)
    assert copy["layers"]["ffn"]["up"]["kernel"].is_deleted()
    back = unmerge_donated(donated, adapter)
    jax.tree.map(np.testing.assert_array_equal, back, unmerge(kept, adapter))


@pytest.mark.parametrize("change", [merge, merge_donated, unmerge, unmerge_donated])
@pytest.mark.parametrize("name", ["shared products K=2", "shared factors K=2", "direct"])
def test_an_adapter_of_several_prompts_is_refused(params_of, name, change):
    params = params_of(EDGE)
    with raises(ConfigError, "adapter", 2):
        change(params, ADAPTERS[name](EDGE))
    assert not params["layers"]["ffn"]["up"]["kernel"].is_deleted()


@pytest.mark.parametrize("name", ["shared products K=2", "direct"])
@pytest.mark.parametrize("prompt", [-1, 2])
def test_a_prompt_that_the_adapter_lacks_is_refused(name, prompt):
    with raises(ConfigError, "prompt", prompt, "0 to 1"):
        ADAPTERS[name](EDGE).select(prompt)


def test_rows_that_do_not_divide_among_the_prompts_are_refused(params_of):
    with raises(ConfigError, "x_BTD", 3, 2):
        logits(Decoder(EDGE), params_of(EDGE), TOKENS[:3], adapter=gated_pool(EDGE))


def test_merging_another_prompt_does_not_compile_again(params_of):
    adapter, params = gated_pool(EDGE), params_of(EDGE)
    merge(params, adapter.select(0))
    count = merging._keeping._cache_size()
    other = merge(params, adapter.select(1))
    again = merge(params, gated_pool(EDGE, seed=5).select(0))
    assert merging._keeping._cache_size() == count
    assert not np.array_equal(other["layers"]["ffn"]["up"]["kernel"], again["layers"]["ffn"]["up"]["kernel"])


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 2, "model": 2}, {"data": 4}])
def test_merging_keeps_the_shardings_of_the_weights(params_of, sizes):
    # Sizes that four devices divide.
    config = dataclasses.replace(EDGE, family="llama, divisible", vocab_size=56)
    mesh = make_mesh(**sizes)
    shardings = param_shardings(mesh, lambda: init_params(Decoder(config)))
    params = jax.device_put(params_of(config), shardings)
    adapter = single(gated_pool(config))
    merged = merge(params, adapter)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim), after.sharding
    expected = merge(params_of(config), adapter)
    # Matmuls split over devices may sum in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **SAME), merged, expected)


@pytest.mark.parametrize("name", ["shared products K=2", "gumbel products", "direct"])
def test_dropout_zeroes_a_share_of_the_adapters_input_and_keeps_its_mean(name):
    """With a key the side path changes; averaged over many draws it is the path without."""
    adapter = ADAPTERS[name](EDGE).replace(dropout_rate=0.25)
    x = jnp.ones((4, 1, EDGE.width))
    one = adapter.replace(scanned=jax.tree.map(lambda x: x[0], adapter.scanned))
    calm = one.delta("up", x, None)
    drawn = jax.vmap(lambda key: one.delta("up", x, key))(jax.random.split(jax.random.key(0), 4000))
    assert np.max(np.abs(drawn[0] - calm)) > 1e-3
    error = np.std(drawn, axis=0) / np.sqrt(4000)
    # Four standard errors everywhere: 4 · 24 numbers.
    assert np.all(np.abs(np.mean(drawn, axis=0) - calm) <= 4.5 * error + 1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.05, 0.5, 0.999])
def test_dropout_zeroes_its_share_and_scales_up_the_rest(rate):
    y = np.asarray(dropout(jnp.ones((400, 500)), rate, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y)[-1], 1 / (1 - rate), rtol=1e-6)
    # Four standard errors of a share of 200,000 draws.
    assert abs(np.mean(y == 0) - rate) <= 4 * np.sqrt(rate * (1 - rate) / 200_000)


def test_dropout_draws_are_independent_of_each_other():
    """Between keys that differ in one word, and between neighbors along every axis: correlations within chance."""
    x = jnp.ones((32, 64, 100))
    keys = [jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32)) for words in ([0, 0], [0, 1], [1, 0], [1, 1])]
    draws = [np.asarray(dropout(x, 0.5, key)) - 1 for key in keys]  # -1 or 1
    pairs = [(a, b) for i, a in enumerate(draws) for b in draws[:i]]
    for axis in range(3):
        pairs += [(np.delete(a, 0, axis), np.delete(a, -1, axis)) for a in draws]
    # Rows and columns are hashed apart: four corners of a rectangle must not tell on each other.
    pairs += [(a[:, :-1, :-1] * a[:, 1:, :-1], a[:, :-1, 1:] * a[:, 1:, 1:]) for a in draws]
    # A mean of n products of fair signs has the standard deviation 1/√n; the largest of 22 such is below five.
    assert max(abs(np.mean(a * b)) * np.sqrt(a.size) for a, b in pairs) < 5
    # Shares of the rows, too: a hash may repeat along an axis.
    for a in draws:
        for axes in [(0, 1), (0, 2), (1, 2)]:
            mean = a.mean(axis=axes)
            assert np.max(np.abs(mean)) * np.sqrt(a.size / mean.size) < 5


def test_sites_without_an_adapter_are_left_alone():
    adapter = single(gated_pool(OPT))
    assert adapter.delta("gate", jnp.ones((1, 1, 16)), None) is None
    assert adapter.delta("q", jnp.ones((1, 1, 16)), None) is None


@pytest.mark.parametrize("name", ["shared products K=2", "direct", "lora"])
def test_an_adapter_at_initialization_changes_neither_parameters_nor_their_axes(name):
    """A decoder's boxed tree is what `param_shardings` reads; an adapter's arrays are no parameters of it."""
    decoder, key = Decoder(EDGE), jax.random.key(0)
    plain = jax.eval_shape(decoder.init, key, TOKENS)
    boxed = jax.eval_shape(lambda: decoder.init(key, TOKENS, adapter=ADAPTERS[name](EDGE)))
    # The structure holds the boxes, and so the names of the axes.
    assert jax.tree.structure(boxed) == jax.tree.structure(plain)
    assert jax.tree.leaves(boxed) == jax.tree.leaves(plain)
    assert tuple(nn.get_partition_spec(boxed)["params"]["layers"]["ffn"]["up"]["kernel"]) == ("layers", "embed", "mlp")


SWAPPED = [name for name in ADAPTERS if name != "lora"]


@pytest.mark.parametrize("name", SWAPPED)
def test_a_merged_model_is_written_over_by_the_next(params_of, name):
    adapter, params = ADAPTERS[name](EDGE), params_of(EDGE)
    before = copied(params)
    held = merge_over(merge(params, adapter.select(0)), params, adapter.select(1))
    jax.tree.map(np.testing.assert_array_equal, held, merge(params, adapter.select(1)))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_ten_thousand_swaps_leave_the_bits_of_a_fresh_merge(params_of):
    adapter, params = gated_pool(EDGE), params_of(EDGE)
    before = copied(params)
    each = [adapter.select(0), adapter.select(1)]
    held = merge(params, each[0])
    for i in range(10_000):
        held = merge_over(held, params, each[i % 2])
    jax.tree.map(np.testing.assert_array_equal, held, merge(params, each[1]))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_what_cannot_be_written_over_is_refused(params_of):
    adapter, params = gated_pool(EDGE), params_of(EDGE)
    with raises(ConfigError, "held", "merge(params, adapter)", code="base"):
        merge_over(params, params, adapter.select(0))
    with raises(ConfigError, "held", "q, v"):
        merge_over(merge(params, lora(EDGE)), params, adapter.select(0))
    with raises(ConfigError, "adapter", 2):
        merge_over(merge(params, adapter.select(0)), params, adapter)


def test_all_experts_side_by_side_and_the_chosen_ones_say_the_same(monkeypatch):
    rows = np.arange(8) % 2
    x_BTD = noise_like(np.zeros((8, 3, EDGE.width)), 5)
    for mix in ("products", "factors"):
        adapter = gated_pool(EDGE, mix=mix)
        one = adapter.with_gates(jax.tree.map(lambda x: x[0][rows], adapter.gates))
        said = {}
        for few in (0, 4):
            monkeypatch.setattr(gated_pool_module, "FEW_TOKENS", few)
            said[few] = one.delta("up", x_BTD, None)
        np.testing.assert_allclose(said[0], said[4], **SAME)
        assert np.abs(said[0]).max() > 0.1


@pytest.mark.parametrize("name", ["shared products K=E", "per-layer products K=2", "lora"])
@pytest.mark.parametrize("site", ["up", "down"])
def test_a_layer_in_mixed_precision_adds_what_the_adapter_says(name, site):
    """As part of the layer's own product where that is done, `up` of K = E and LoRA, or beside it; gradients too."""
    adapter = ADAPTERS[name](EDGE).replace(operands=jnp.bfloat16, dropout_rate=0.0)
    inputs, outputs = EDGE.site_shape(site)
    layer = Linear(outputs, ("embed", "mlp"), operands=jnp.bfloat16, name=site)
    x, kernel = noise_like(np.zeros((4, 3, inputs)), 5), noise_like(np.zeros((inputs, outputs)), 6)
    one = adapter.replace(scanned=jax.tree.map(lambda x: x[0], adapter.scanned))

    def plain(x, adapter):
        return product(x, kernel, jnp.bfloat16) + adapter.delta(site, x, None)

    def ours(x, adapter):
        return layer.apply({"params": {"kernel": kernel}}, x, adapter)

    g = noise_like(np.zeros((4, 3, outputs)), 7)
    (y, pull), (expected, wanted) = jax.vjp(ours, x, one), jax.vjp(plain, x, one)
    np.testing.assert_allclose(y, expected, **SAME)
    for a, b in zip(jax.tree.leaves(pull(g)), jax.tree.leaves(wanted(g)), strict=True):
        if a.dtype != jax.dtypes.float0:  # numbers of experts have no gradient
            np.testing.assert_allclose(a, b, **SAME)


def other_layers(adapter, count):
    return adapter.replace(scanned=jax.tree.map(lambda x: jnp.resize(x, (count, *x.shape[1:])), adapter.scanned))


@pytest.mark.parametrize("count", [1, EDGE.num_layers - 1, 2 * EDGE.num_layers])
@pytest.mark.parametrize("make", [lora, lambda c: gated_pool(c).select(0)], ids=["lora", "pool"])
def test_an_adapter_of_another_depth_is_refused(make, count):
    """Indices beyond the end would read its last layer, and a single layer would do for all."""
    params = random_params(EDGE)
    with raises(ConfigError, "adapter.down", f"{count} layers", EDGE.num_layers):
        merge(params, other_layers(make(EDGE), count))


def test_an_adapter_of_another_width_or_of_other_layers_is_refused():
    params, adapter = random_params(EDGE), lora(EDGE)
    narrow = {site: {**pair, "a": pair["a"][:, :1]} for site, pair in adapter.scanned.items()}
    with raises(ConfigError, "adapter.down", "(1, 16)"):
        merge(params, adapter.replace(scanned=narrow))
    with raises(ConfigError, "adapter", "q, k, v"):
        merge(params, adapter.replace(scanned={"up_proj": adapter.scanned["up"]}))


@pytest.mark.parametrize("experts", [E - 1, 2 * E])
def test_gates_of_another_number_of_experts_are_refused(experts):
    adapter = gated_pool(EDGE).select(0)
    with raises(ConfigError, "gates", experts, E):
        merge(random_params(EDGE), adapter.with_gates(adapter.gates.replace(experts=experts)))
