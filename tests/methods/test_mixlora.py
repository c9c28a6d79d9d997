"""MixLoRA against a plain rendering of its equations, alone and in the decoder; its balance loss, and gradients."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from helpers import EDGE, OPT, SAME, SETTINGS, random_params, token_rows
from moe_reference import check_greedy_decoding, logits, losses, plain, quick_jit, random_module_params

from lora_gen_jax.adapters.protocol import FrozenFFN
from lora_gen_jax.config import Config
from lora_gen_jax.decoder.layers import RECORDS, records_of
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.inference.cost import Pass, count_pass
from lora_gen_jax.methods.mixlora import METHOD, MixLoRA, MixLoRAAdapter, balance_loss, top_experts

pytestmark = pytest.mark.float64
L, E, R, K = EDGE.num_layers, SETTINGS.num_experts, SETTINGS.rank, SETTINGS.top_k
SCALE = SETTINGS.alpha / SETTINGS.rank
BALANCED = dataclasses.replace(SETTINGS, balance_coefficient=0.5)
TOKENS = np.array(token_rows([9, 9], EDGE.vocab_size), np.int32)
FAMILIES = pytest.mark.parametrize("config", [EDGE, OPT], ids=["llama", "opt"])


def made(config, settings=BALANCED):
    """(module, parameters with B away from zero, adapter)."""
    module = MixLoRA(config, settings)
    params = random_module_params(module)
    return module, params, module.apply({"params": params}, None, None).adapter


def one_layer(adapter, layer):
    return adapter.replace(scanned=jax.tree.map(lambda x: x[layer], adapter.scanned))


def frozen_ffn(config, params, layer, dtype=float):
    """The FFN of one layer as the decoder hands it to an adapter, and how often each of its layers was asked."""
    asked = dict.fromkeys(config.ffn_sites, 0)

    def project(site, x):
        asked[site] += 1
        leaf = {name: value[layer].astype(dtype) for name, value in params["layers"]["ffn"][site].items()}
        return x @ leaf["kernel"] + (leaf["bias"][None, None] if "bias" in leaf else jnp.zeros((), dtype))

    def activate(gate, up):
        return jax.nn.relu(up) if gate is None else jax.nn.silu(gate) * up

    return FrozenFFN(project, activate, config.ffn_sites), asked


CASES = [(EDGE, 2), (OPT, 2), (EDGE, 1), (EDGE, 3)]


@pytest.mark.parametrize(("config", "top_k"), CASES, ids=[f"{config.family} K={k}" for config, k in CASES])
def test_the_ffn_is_the_weighted_sum_of_the_likeliest_experts(config, top_k):
    _, params, adapter = made(config, dataclasses.replace(SETTINGS, top_k=top_k))
    base, rng = random_params(config), np.random.default_rng(5)
    model, method = reference.Model(config, plain(base)), reference.MixLoRA(plain(params), SCALE, top_k)
    x = rng.standard_normal((2, 4, config.width))

    @quick_jit
    def layer_of(adapter, layer):
        one, (frozen, asked) = one_layer(adapter, layer), frozen_ffn(config, base, layer)
        y = one.ffn(jnp.asarray(x), frozen, None)
        assert set(asked.values()) == {1}
        return y, one.record("ffn", jnp.asarray(x))

    for layer in range(L):
        said, (got, logits_BTE) = {}, layer_of(adapter, layer)
        want = method.ffn(model, layer, x.reshape(8, -1).astype(np.float64), said)
        np.testing.assert_allclose(got, want.reshape(2, 4, -1), **SAME)
        np.testing.assert_allclose(logits_BTE, said["ffn"][0].reshape(2, 4, E), **SAME)


def test_the_linear_layers_of_the_ffn_are_left_to_the_experts():
    one, x = one_layer(made(EDGE)[2], 0), jnp.ones((1, 2, EDGE.width))
    for site in EDGE.ffn_sites:
        assert one.delta(site, x, None) is None
    for site in ("q", "k", "v", "o", "gate", "up", "down"):
        assert one.record(site, x) is None


@pytest.mark.parametrize(
    ("named", "carried"), [(None, "qkvo"), (("v", "q"), "qv"), (("q", "gate", "up"), "q"), (("up", "down"), "")]
)
def test_attention_carries_a_plain_lora_where_the_config_says(named, carried):
    settings = dataclasses.replace(SETTINGS, lora_sites=named)
    _, params, adapter = made(EDGE, settings)
    one, rng = one_layer(adapter, 1), np.random.default_rng(0)
    for site in ("q", "k", "v", "o"):
        x = jnp.asarray(rng.standard_normal((1, 3, EDGE.site_shape(site)[0])))
        delta = one.delta(site, x, None)
        assert (delta is not None) == (site in carried)
        if delta is not None:
            a, b = (np.asarray(params[f"{site}_{name}"][1], np.float64) for name in ("a", "b"))
            np.testing.assert_allclose(delta, SCALE * np.asarray(x, np.float64) @ a @ b, **SAME)
    # The experts stand at all of the FFN's layers whatever is named.
    assert all(params[f"{site}_a"].shape[:2] == (L, E) for site in EDGE.ffn_sites)


@FAMILIES
def test_the_model_with_the_adapter_says_what_the_equations_say(config):
    _, params, adapter = made(config)
    frozen = random_params(config)
    model, method = reference.Model(config, plain(frozen)), reference.MixLoRA(plain(params), SCALE, K)
    got = np.asarray(logits(Decoder(config), frozen, TOKENS, adapter))
    np.testing.assert_allclose(got, [model.run(row, method)[0] for row in TOKENS], **SAME)
    assert np.max(np.abs(got - np.asarray(logits(Decoder(config), frozen, TOKENS)))) > 0.1


@FAMILIES
def test_it_starts_as_the_base_to_the_bit(config):
    module, frozen = MixLoRA(config, SETTINGS), random_params(config)
    params = quick_jit(lambda key: module.init(key, None, None)["params"])(jax.random.key(0))
    adapter = module.apply({"params": params}, None, None).adapter
    base = logits(Decoder(config), frozen, TOKENS)
    np.testing.assert_array_equal(logits(Decoder(config), frozen, TOKENS, adapter), base)
    sites = ("q", "k", "v", "o", *config.ffn_sites)
    assert sorted(params) == sorted(["router", *(f"{site}_{name}" for site in sites for name in ("a", "b"))])
    assert params["router"].shape == (L, config.width, E)
    # 192 draws of N(0, 0.02²): four standard errors of a standard deviation are 0.2 of it.
    assert abs(np.std(params["router"]) / 0.02 - 1) < 0.2
    for site in sites:
        (inputs, outputs), lead = config.site_shape(site), (L, E) if site in config.ffn_sites else (L,)
        a, b = params[f"{site}_a"], params[f"{site}_b"]
        assert (a.shape, b.shape) == ((*lead, inputs, R), (*lead, R, outputs))
        assert not np.any(b)
        assert 0.8 * inputs**-0.5 < np.max(np.abs(a)) <= inputs**-0.5


@pytest.mark.usefixtures("float32")
def test_it_starts_as_the_base_in_bf16_as_well():
    """Weights that are rounded to bf16 sum to 1 within 0.4 % only: the FFN must not shrink or grow by that."""
    base, settings = random_params(EDGE), dataclasses.replace(SETTINGS, top_k=3)
    adapter = made(EDGE, settings)[2]
    zeroed = jax.tree_util.tree_map_with_path(lambda p, x: x if "'b'" not in str(p) else 0 * x, adapter.scanned)
    one, (frozen, _) = one_layer(adapter.replace(scanned=zeroed), 0), frozen_ffn(EDGE, base, 0, jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 50, EDGE.width))).astype(jnp.bfloat16)
    y = quick_jit(lambda one: one.ffn(x, frozen, None))(one)
    assert y.dtype == jnp.bfloat16
    plain_ffn = quick_jit(
        lambda: frozen.project("down", frozen.activate(frozen.project("gate", x), frozen.project("up", x)))
    )
    np.testing.assert_array_equal(y, plain_ffn())


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [1, 2, 2, 2], [3, 1, 1, 1], [5, 5, 0, 5]])
def test_a_tie_keeps_exactly_k_experts_the_first_ones(row):
    weight, chosen = top_experts(jnp.array([[row]], float), 2)
    best = sorted(sorted(range(4), key=lambda e: (-row[e], e))[:2])
    np.testing.assert_array_equal(np.flatnonzero(chosen.sum(axis=2)), best)
    assert chosen.sum() == 2
    np.testing.assert_allclose(weight.sum(), 1.0, **SAME)


@pytest.fixture(scope="module")
def frozen():
    return random_params(EDGE, seed=3)


def test_the_balance_loss_is_that_of_the_tokens_alone_over_all_layers(frozen):
    module, params, _ = made(EDGE)
    rows = reference.said_of_the_batch(reference.Model(EDGE, plain(frozen)), reference.MixLoRA(plain(params), SCALE, K))
    want = reference.mixlora_balance(rows, K)
    assert abs(want / K - 1) > 0.02
    _, added = quick_jit(lambda p: losses(module, Decoder(EDGE), frozen, p))(params)
    np.testing.assert_allclose(added, BALANCED.balance_coefficient * want, **SAME)


def test_the_balance_loss_by_hand():
    """Two tokens of three experts, one of them padding; then all experts in even use, which gives K."""
    say = jnp.log(jnp.array([[[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]]))
    read = jnp.array([[True, False]])
    loss = quick_jit(balance_loss, static_argnums=2)
    np.testing.assert_allclose(loss(say, read, 2), 3 * (0.5 + 0.3), **SAME)
    even = jnp.log(jnp.array([[[[0.6, 0.3, 0.1]], [[0.1, 0.6, 0.3]], [[0.3, 0.1, 0.6]]]]))
    np.testing.assert_allclose(loss(even, jnp.ones((3, 1), bool), 2), 2.0, **SAME)
    assert loss(even, jnp.zeros((3, 1), bool), 2) == 0


def test_without_a_coefficient_nothing_is_asked_for_and_nothing_added():
    module = MixLoRA(EDGE, dataclasses.replace(SETTINGS, balance_coefficient=0.0))
    assert module.auxiliary(None, None, None) == (0.0, {})


def test_the_unweighted_loss_is_logged():
    say = jnp.asarray(np.random.default_rng(0).standard_normal((L, 4, 24, E)))
    added, metrics = MixLoRA(EDGE, BALANCED).auxiliary(None, {"ffn": say}, reference.BATCH)
    np.testing.assert_allclose(added, BALANCED.balance_coefficient * metrics["balance"], **SAME)


def largest(leaf):
    """The largest of each layer."""
    return np.max(np.abs(np.asarray(leaf).reshape(L, -1)), axis=1)


def test_the_answers_teach_router_and_experts_of_every_layer(frozen):
    module, params, _ = made(EDGE)
    for name, leaf in quick_jit(jax.grad(lambda p: losses(module, Decoder(EDGE), frozen, p)[0]))(params).items():
        assert leaf.dtype == params[name].dtype
        assert np.all(largest(leaf) > 1e-6), name


@pytest.fixture(scope="module")
def balance_gradient(frozen):
    """(what the method adds, its gradient) by what the backward pass keeps; compiled once."""
    module, params, _ = made(EDGE)

    @functools.cache
    def get(remat):
        decoder = Decoder(EDGE, remat=remat)
        return quick_jit(jax.value_and_grad(lambda p: losses(module, decoder, frozen, p)[1]))(params)

    return get


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_balance_loss_alone_teaches_the_router_of_every_layer(balance_gradient, remat):
    found = balance_gradient(remat)
    assert np.all(largest(found[1]["router"]) > 1e-4)
    if remat != "none":
        close = functools.partial(np.testing.assert_allclose, **SAME)
        jax.tree.map(close, found, balance_gradient("none"))


@pytest.mark.usefixtures("float32")
def test_gradients_stay_fp32_where_activations_are_bf16():
    """A sum over 2048 tokens that bf16 would round: the gradient equals that of the same rounded inputs in fp32."""
    one, frozen = one_layer(made(EDGE)[2], 1), random_params(EDGE, seed=3)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 1024, EDGE.width))).astype(jnp.bfloat16)

    def total(scanned, x):
        y = one.replace(scanned=scanned).ffn(x, frozen_ffn(EDGE, frozen, 1, x.dtype)[0], None)
        assert y.dtype == x.dtype
        return jnp.sum(y.astype(jnp.float32))

    half, full = (quick_jit(jax.grad(total))(one.scanned, x.astype(kind)) for kind in (jnp.bfloat16, jnp.float32))
    for part in ("experts", "router"):
        for leaf, exact in zip(jax.tree.leaves(half[part]), jax.tree.leaves(full[part]), strict=True):
            assert leaf.dtype == jnp.float32
            assert np.any(leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32))
            # What is multiplied is rounded to 8 bits; the errors of thousands of tokens do not add up.
            assert np.linalg.norm(leaf - exact) < 0.03 * np.linalg.norm(exact)
    assert one.record("ffn", x).dtype == jnp.float32


def test_greedy_decoding_with_a_cache_is_the_full_forward_pass(frozen):
    check_greedy_decoding(frozen, made(EDGE)[2], TOKENS)


@FAMILIES
def test_macs_are_those_of_the_program(config):
    settings = dataclasses.replace(SETTINGS, rank=5, top_k=3, lora_sites=("q", "v", "up"))
    adapter, frozen, sizes = made(config, settings)[2], random_params(config), Pass(2, 8, 8)
    more = count_pass(Decoder(config), frozen, adapter, sizes).matmuls
    more -= count_pass(Decoder(config), frozen, None, sizes).matmuls
    assert METHOD.token_macs(config, Config(generator=settings)) * 16 == more


def test_every_lora_draws_dropout_of_its_own_and_the_router_none(frozen):
    """With all of B but one site's at zero, the output changes with the key: each site drops its input."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, EDGE.width)))
    ffn, one = frozen_ffn(EDGE, frozen, 0)[0], one_layer(made(EDGE)[2].replace(dropout_rate=0.5), 0)
    output = quick_jit(lambda one, key: one.ffn(x, ffn, key))
    for site in EDGE.ffn_sites:
        experts = {name: pair if name == site else {**pair, "b": 0 * pair["b"]} for name, pair in
                   one.scanned["experts"].items()}  # fmt: skip
        alone = one.replace(scanned={**one.scanned, "experts": experts})
        calm, *drawn = (output(alone, key) for key in (None, jax.random.key(0), jax.random.key(1)))
        assert not np.allclose(drawn[0], calm, atol=1e-3)
        assert not np.allclose(drawn[0], drawn[1], atol=1e-3)
    # With all of B at zero nothing is left to drop.
    quiet = one.replace(scanned={**one.scanned, "experts": jax.tree.map(jnp.zeros_like, one.scanned["experts"])})
    np.testing.assert_array_equal(output(quiet, jax.random.key(0)), output(quiet, None))
    assert not np.allclose(one.delta("q", x, jax.random.key(0)), one.delta("q", x, None), atol=1e-3)


def test_dropout_on_the_way_out_keeps_the_mean(frozen):
    """What `down`'s LoRA adds is linear in its input, so that the mean over draws is what no dropout gives."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, EDGE.width)))
    ffn, one = frozen_ffn(EDGE, frozen, 0)[0], one_layer(made(EDGE)[2].replace(dropout_rate=0.25), 0)
    experts = {site: jax.tree.map(jnp.zeros_like, pair) for site, pair in one.scanned["experts"].items()}
    one = one.replace(scanned={**one.scanned, "experts": {**experts, "down": one.scanned["experts"]["down"]}})
    draw = quick_jit(jax.vmap(lambda key: one.ffn(x, ffn, key)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    error = np.std(drawn, axis=0) / np.sqrt(2000)
    # 48 numbers: four and a half standard errors.
    assert np.all(error > 0)
    assert np.all(np.abs(np.mean(drawn, axis=0) - one.ffn(x, ffn, None)) <= 4.5 * error + 1e-6)


def test_the_method_takes_its_sizes_from_the_config():
    settings = dataclasses.replace(BALANCED, dropout=0.1)
    module = METHOD.build(Config(generator=settings), SimpleNamespace(edge=SimpleNamespace(config=EDGE)))
    assert (module.edge, module.settings, module.reader) == (EDGE, settings, None)
    adapter = made(EDGE, settings)[2]
    assert isinstance(adapter, MixLoRAAdapter)
    assert (adapter.scale, adapter.top_k, adapter.dropout_rate) == (SCALE, K, 0.1)
    assert not hasattr(adapter, "weight_delta")


def test_the_decoder_records_every_layer_at_the_ffns_input(frozen):
    _, params, adapter = made(EDGE)
    read = quick_jit(
        lambda adapter: Decoder(EDGE).apply({"params": frozen}, TOKENS, adapter=adapter, mutable=[RECORDS])
    )
    records = records_of(read(adapter)[1])
    want = reference.Model(EDGE, plain(frozen)).run(TOKENS[1], reference.MixLoRA(plain(params), SCALE, K))[1]
    assert sorted(records) == ["ffn"]
    np.testing.assert_allclose(records["ffn"][:, 1], want["ffn"], **SAME)
