"""LoRAMoE against a plain rendering of its equations, alone and in the decoder; its balance loss, and gradients."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from helpers import EDGE, OPT, SAME, SETTINGS, raises, random_params, token_rows
from moe_reference import (
    BATCH,
    KNOWLEDGE,
    check_greedy_decoding,
    logits,
    losses,
    plain,
    quick_jit,
    random_module_params,
)

from lora_gen_jax.config import Config, DataConfig, LoRAMoEConfig
from lora_gen_jax.decoder.layers import RECORDS, records_of
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import DataError
from lora_gen_jax.inference.cost import Pass, count_pass
from lora_gen_jax.methods.lora_moe import METHOD, LoRAMoE, LoRAMoEAdapter, balance_loss

pytestmark = pytest.mark.float64
E, R, MARGIN = SETTINGS.num_experts, SETTINGS.rank, 0.3
SCALE = SETTINGS.alpha / SETTINGS.rank
BALANCED = dataclasses.replace(SETTINGS, balance_coefficient=0.5)
TOKENS = np.array(token_rows([9, 9], EDGE.vocab_size), np.int32)
FAMILIES = pytest.mark.parametrize("config", [EDGE, OPT], ids=["llama", "opt"])


def made(config, settings=BALANCED):
    """(module, parameters with B away from zero, adapter)."""
    module = LoRAMoE(config, settings, MARGIN)
    params = random_module_params(module)
    return module, params, module.apply({"params": params}, None, None).adapter


def one_layer(adapter, layer):
    return adapter.replace(scanned=jax.tree.map(lambda x: x[layer], adapter.scanned))


@FAMILIES
def test_every_site_mixes_its_own_experts_by_its_own_router(config):
    _, params, adapter = made(config)
    method, rng = reference.LoRAMoE(plain(params), SCALE), np.random.default_rng(5)
    for site in config.ffn_sites:
        x = rng.standard_normal((2, 4, config.site_shape(site)[0]))
        for layer in range(config.num_layers):
            said, one = {}, one_layer(adapter, layer)
            want = method.delta(site, layer, x.reshape(8, -1).astype(np.float64), said)
            assert np.max(np.abs(want)) > 0.3
            np.testing.assert_allclose(one.delta(site, jnp.asarray(x), None), want.reshape(2, 4, -1), **SAME)
            np.testing.assert_allclose(one.record(site, jnp.asarray(x)), said[site][0].reshape(2, 4, E), **SAME)


def test_no_other_site_is_touched():
    one, x = one_layer(made(OPT)[2], 0), jnp.ones((1, 2, OPT.width))
    for site in ("q", "k", "v", "o", "gate", "ffn"):
        assert one.delta(site, x, None) is None
        assert one.record(site, x) is None


@FAMILIES
def test_the_model_with_the_adapter_says_what_the_equations_say(config):
    _, params, adapter = made(config)
    frozen = random_params(config)
    model, method = reference.Model(config, plain(frozen)), reference.LoRAMoE(plain(params), SCALE)
    got = np.asarray(logits(Decoder(config), frozen, TOKENS, adapter))
    np.testing.assert_allclose(got, [model.run(row, method)[0] for row in TOKENS], **SAME)
    assert np.max(np.abs(got - np.asarray(logits(Decoder(config), frozen, TOKENS)))) > 0.1


@FAMILIES
def test_it_starts_as_the_base_to_the_bit(config):
    module, frozen = LoRAMoE(config, SETTINGS), random_params(config)
    params = quick_jit(lambda key: module.init(key, None, None)["params"])(jax.random.key(0))
    adapter = module.apply({"params": params}, None, None).adapter
    base = logits(Decoder(config), frozen, TOKENS)
    np.testing.assert_array_equal(logits(Decoder(config), frozen, TOKENS, adapter), base)
    assert sorted(params) == sorted(f"{site}_{name}" for site in config.ffn_sites for name in ("router", "a", "b"))
    for site in config.ffn_sites:
        inputs, outputs = config.site_shape(site)
        router, a, b = (params[f"{site}_{name}"] for name in ("router", "a", "b"))
        assert router.shape == (config.num_layers, inputs, E)
        assert (a.shape, b.shape) == ((config.num_layers, E, inputs, R), (config.num_layers, E, R, outputs))
        assert not np.any(b)
        for drawn in (router, a):
            # U(±1/√inputs), at least a hundred draws a layer: the largest comes near the bound.
            assert np.all(np.abs(drawn) <= inputs**-0.5)
            assert np.all(np.max(np.abs(np.asarray(drawn).reshape(config.num_layers, -1)), axis=1) > 0.8 * inputs**-0.5)


@pytest.fixture(scope="module")
def frozen():
    return random_params(EDGE, seed=3)


def test_the_balance_loss_is_that_of_the_tokens_alone_and_of_each_rows_kind_of_task(frozen):
    module, params, _ = made(EDGE)
    model, method = reference.Model(EDGE, plain(frozen)), reference.LoRAMoE(plain(params), SCALE)
    rows = reference.said_of_the_batch(model, method)
    want = reference.lora_moe_balance(rows, KNOWLEDGE, MARGIN)
    _, added = quick_jit(lambda p: losses(module, Decoder(EDGE), frozen, p))(params)
    np.testing.assert_allclose(added, BALANCED.balance_coefficient * want, **SAME)
    # The kinds matter, and so does the margin.
    assert abs(reference.lora_moe_balance(rows, [not k for k in KNOWLEDGE], MARGIN) / want - 1) > 1e-3
    assert abs(reference.lora_moe_balance(rows, KNOWLEDGE, 0.0) / want - 1) > 1e-2


def test_the_balance_loss_by_hand():
    """Two rows of two tokens and one, two experts: Q = [[0.7·1.5, 0.3·0.5], [0.3·0.5, 0.7·1.5]]."""
    probability = jnp.array([[[[0.9, 0.1], [0.5, 0.5]], [[0.3, 0.7], [0.8, 0.2]]]])
    read, knowledge = jnp.array([[True, True], [True, False]]), jnp.array([True, False])
    q = np.array([1.05, 0.15, 0.15, 1.05])
    want = np.var(q, ddof=1) / np.mean(q) ** 2
    np.testing.assert_allclose(balance_loss(probability, read, knowledge, 0.5), [want], **SAME)
    # A single row of a single expert has nothing to balance, and no variance.
    np.testing.assert_array_equal(balance_loss(probability[:, :1, :, :1], read[:1], knowledge[:1], 0.5), [0.0])


@pytest.mark.parametrize("tokens", [(3, 3, 3), (1, 7, 4)])
def test_uniform_gates_are_in_balance_whatever_the_rows_lengths(tokens):
    """As in the authors' code, whose rows are padded to one length; sums would give 0.41 for rows of 1, 7 and 4."""
    read = np.arange(7)[None] < np.array(tokens)[:, None]
    loss = balance_loss(jnp.full((2, 3, 7, E), 1 / E), jnp.asarray(read), jnp.zeros(3, bool), 0.0)
    # Q are means of equal numbers: rounding alone.
    np.testing.assert_allclose(loss, [0.0, 0.0], atol=(7 * np.finfo(np.float32).eps) ** 2)
    # A row without any token, as a batch may hold for its shape's sake, is no division by zero.
    padded = np.concatenate([read, np.zeros((1, 7), bool)])
    assert np.all(np.isfinite(balance_loss(jnp.full((2, 4, 7, E), 1 / E), padded, jnp.zeros(4, bool), 0.0)))


def test_without_a_coefficient_nothing_is_asked_for_and_nothing_added():
    module = LoRAMoE(EDGE, dataclasses.replace(SETTINGS, balance_coefficient=0.0))
    assert module.auxiliary(None, None, None) == (0.0, {})


def test_a_batch_that_does_not_tell_the_kinds_of_tasks_is_refused():
    batch = BATCH.replace(prompts=BATCH.prompts.replace(knowledge_P=None))
    with raises(DataError, "prompts.knowledge_P", "generator.balance_coefficient"):
        LoRAMoE(EDGE, BALANCED).auxiliary(None, {}, batch)


def test_the_unweighted_loss_is_logged(frozen):
    records = {"up": jax.nn.softmax(jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 24, E))))}
    added, metrics = LoRAMoE(EDGE, BALANCED, MARGIN).auxiliary(None, records, BATCH)
    np.testing.assert_allclose(added, BALANCED.balance_coefficient * metrics["balance"], **SAME)


def per_layer(leaf):
    """The largest of each layer."""
    return np.max(np.abs(np.asarray(leaf).reshape(EDGE.num_layers, -1)), axis=1)


def test_the_answers_teach_routers_and_experts_of_every_layer(frozen):
    module, params, _ = made(EDGE)
    for name, leaf in quick_jit(jax.grad(lambda p: losses(module, Decoder(EDGE), frozen, p)[0]))(params).items():
        assert leaf.dtype == params[name].dtype
        assert np.all(per_layer(leaf) > 1e-6), name


@pytest.fixture(scope="module")
def balance_gradient(frozen):
    """(what the method adds, its gradient) by what the backward pass keeps; compiled once."""
    module, params, _ = made(EDGE)

    @functools.cache
    def get(remat):
        return quick_jit(jax.value_and_grad(lambda p: losses(module, Decoder(EDGE, remat=remat), frozen, p)[1]))(params)

    return get


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_balance_loss_alone_teaches_the_routers_of_every_layer(balance_gradient, remat):
    found = balance_gradient(remat)
    for site in EDGE.ffn_sites:
        assert np.all(per_layer(found[1][f"{site}_router"]) > 1e-4), site
    if remat != "none":
        close = functools.partial(np.testing.assert_allclose, **SAME)
        jax.tree.map(close, found, balance_gradient("none"))


@pytest.mark.usefixtures("float32")
def test_gradients_stay_fp32_where_activations_are_bf16():
    """A sum over 4096 tokens that bf16 would round: the gradient equals that of the same rounded inputs in fp32."""
    one = one_layer(made(EDGE)[2], 1)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 1024, EDGE.width))).astype(jnp.bfloat16)

    def total(scanned, x):
        y = one.replace(scanned=scanned).delta("up", x, None)
        assert y.dtype == x.dtype
        return jnp.sum(y.astype(jnp.float32))

    half, full = (quick_jit(jax.grad(total))(one.scanned, x.astype(kind))["up"] for kind in (jnp.bfloat16, jnp.float32))
    for name, leaf in half.items():
        assert leaf.dtype == jnp.float32
        assert np.any(leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32)), name
        # What is multiplied is rounded to 8 bits; the errors of thousands of tokens do not add up.
        assert np.linalg.norm(leaf - full[name]) < 0.02 * np.linalg.norm(full[name]), name
    assert one.record("up", x).dtype == jnp.float32


def test_greedy_decoding_with_a_cache_is_the_full_forward_pass(frozen):
    check_greedy_decoding(frozen, made(EDGE)[2], TOKENS)


@FAMILIES
def test_macs_are_those_of_the_program(config):
    settings = dataclasses.replace(SETTINGS, rank=5)
    adapter, frozen, sizes = made(config, settings)[2], random_params(config), Pass(2, 8, 8)
    more = count_pass(Decoder(config), frozen, adapter, sizes).matmuls
    more -= count_pass(Decoder(config), frozen, None, sizes).matmuls
    assert METHOD.token_macs(config, Config(generator=settings)) * 16 == more


def test_dropout_spares_the_router_and_keeps_the_mean():
    one = one_layer(made(EDGE)[2].replace(dropout_rate=0.25), 0)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, EDGE.width)))
    calm = one.delta("gate", x, None)
    draw = quick_jit(jax.vmap(lambda key: one.delta("gate", x, key)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    error = np.std(drawn, axis=0) / np.sqrt(4000)
    assert np.all(error > 0)
    # Were the router's input dropped too, the mean would be another. 72 numbers: four and a half standard errors.
    assert np.all(np.abs(np.mean(drawn, axis=0) - calm) <= 4.5 * error + 1e-6)


def test_the_method_takes_its_sizes_from_the_config():
    data = DataConfig(knowledge_tasks=("warm",))
    config = Config(generator=BALANCED, lora_moe=LoRAMoEConfig(margin=0.2), data=data)
    module = METHOD.build(config, SimpleNamespace(edge=SimpleNamespace(config=EDGE)))
    assert (module.edge, module.settings, module.margin, module.reader) == (EDGE, BALANCED, 0.2, None)
    # Where no task asks for knowledge, no half of the experts is preferred.
    plain = dataclasses.replace(config, data=DataConfig())
    assert METHOD.build(plain, SimpleNamespace(edge=SimpleNamespace(config=EDGE))).margin == 0
    settings = dataclasses.replace(BALANCED, dropout=0.1)
    adapter = made(EDGE, settings)[2]
    assert isinstance(adapter, LoRAMoEAdapter)
    assert (adapter.scale, adapter.dropout_rate) == (SCALE, 0.1)
    assert not hasattr(adapter, "weight_delta")


def test_the_decoder_records_every_layer_at_every_site(frozen):
    _, params, adapter = made(EDGE)
    read = quick_jit(
        lambda adapter: Decoder(EDGE).apply({"params": frozen}, TOKENS, adapter=adapter, mutable=[RECORDS])
    )
    records = records_of(read(adapter)[1])
    want = reference.Model(EDGE, plain(frozen)).run(TOKENS[1], reference.LoRAMoE(plain(params), SCALE))[1]
    assert sorted(records) == sorted(EDGE.ffn_sites)
    for site, layers in want.items():
        np.testing.assert_allclose(records[site][:, 1], layers, **SAME)
