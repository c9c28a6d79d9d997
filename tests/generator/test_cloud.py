"""The cloud side: prompts packed into rows give what each gives alone; specializing is bucketed and checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOUD, EDGE, OPT, SAME, SETTINGS, generator_variables, prompts_of, raises, random_params, token_rows

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.lora import PromptLoRA, factor_a_init
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.generator import specialize as specializing
from lora_gen_jax.generator.cloud import CloudEncoder, pack_prompts
from lora_gen_jax.generator.lora_gen import ExpertPool, LoRAGen
from lora_gen_jax.generator.specialize import specialize

pytestmark = pytest.mark.float64
L = EDGE.num_layers


@pytest.fixture(scope="module")
def frozen():
    return random_params(CLOUD, seed=2)


GENERATORS = {
    "shared": SETTINGS,
    "per_layer": dataclasses.replace(SETTINGS, pool="per_layer"),
    "gumbel": dataclasses.replace(SETTINGS, routing="gumbel"),
    "direct": dataclasses.replace(SETTINGS, generator="direct"),
}


@pytest.fixture(scope="module")
def generators(frozen):
    """(module, variables) of each variant; made once."""
    made = {}

    def get(name):
        if name not in made:
            module = LoRAGen(Decoder(CLOUD), EDGE, GENERATORS[name])
            made[name] = module, generator_variables(module, frozen, prompts_of([4], 1, 16))
        return made[name]

    return get


@pytest.fixture(scope="module")
def encoder(frozen):
    """A cloud encoder whose LoRA does something, and its variables."""
    module = CloudEncoder(Decoder(CLOUD), L, SETTINGS)
    return module, generator_variables(module, frozen, prompts_of([4], 1, 16))


def test_meta_embeddings_start_around_the_embedding_of_a_token(frozen):
    prompts = prompts_of([4], 1, 16)
    started = CloudEncoder(Decoder(CLOUD), L, SETTINGS, meta_start=7).init(jax.random.key(0), frozen, prompts)
    noise = CloudEncoder(Decoder(CLOUD), L, SETTINGS).init(jax.random.key(0), frozen, prompts)
    gap = started["params"]["meta_embedding"] - noise["params"]["meta_embedding"]
    np.testing.assert_allclose(gap, np.tile(frozen["embed"]["embedding"][7], (L, 1)), **SAME)
    assert np.std(noise["params"]["meta_embedding"]) == pytest.approx(0.02, rel=0.3)


def meta_tokens(encoder, frozen, prompts):
    module, variables = encoder
    return np.asarray(jax.jit(module.apply)(variables, frozen, prompts))


def test_prompts_packed_into_rows_give_the_meta_tokens_of_each_alone(encoder, frozen):
    lengths, prompts = [5, 9, 1, 12, 3, 7], token_rows([5, 9, 1, 12, 3, 7], CLOUD.vocab_size, seed=1)
    together = meta_tokens(encoder, frozen, pack_prompts(prompts, L, 2, 40))
    assert together.shape == (6, L, CLOUD.width)
    for p, length in enumerate(lengths):
        alone = meta_tokens(encoder, frozen, pack_prompts([prompts[p]], L, 1, length + L))
        np.testing.assert_allclose(together[p], alone[0], **SAME)
    assert np.max(np.abs(together[0] - together[1])) > 0.01


def test_meta_tokens_are_the_hidden_states_after_the_prompt_in_one_causal_pass(encoder, frozen):
    """Written out for one prompt: embeddings, then L learned ones, then the decoder with the q and v LoRA merged."""
    (prompt,), (_, variables) = token_rows([6], CLOUD.vocab_size), encoder
    p = variables["params"]
    layers = dict(frozen["layers"])
    attention = dict(layers["attention"])
    for site in ("q", "v"):
        delta = 2.0 * np.asarray(p[f"{site}_a"]) @ np.asarray(p[f"{site}_b"])
        attention[site] = {**attention[site], "kernel": attention[site]["kernel"] + delta}
    merged = {**frozen, "layers": {**layers, "attention": attention}}
    embedded = frozen["embed"]["embedding"][np.array(prompt)]
    x = jnp.concatenate([embedded, p["meta_embedding"]])[None]
    positions = jnp.arange(6 + L, dtype=jnp.int32)[None]
    hidden, _ = Decoder(CLOUD).apply({"params": merged}, x, positions, method="encode")
    got = meta_tokens(encoder, frozen, pack_prompts([prompt], L, 1, 16))
    np.testing.assert_allclose(got[0], hidden[0, 6:], **SAME)


def test_padding_of_a_row_changes_nothing(encoder, frozen):
    prompts = token_rows([5, 8], CLOUD.vocab_size)
    packed = pack_prompts(prompts, L, 1, 32)
    other = dataclasses.replace(packed, tokens_BT=np.where(packed.positions_BT < 0, 7, packed.tokens_BT))
    np.testing.assert_array_equal(meta_tokens(encoder, frozen, packed), meta_tokens(encoder, frozen, other))


@pytest.mark.parametrize("config", [dataclasses.replace(CLOUD, embedding_scale=4.0)])
def test_meta_embeddings_are_scaled_as_the_models_own_are(config, frozen):
    module = CloudEncoder(Decoder(config), L, dataclasses.replace(SETTINGS, cloud_rank=0))
    packed = prompts_of([4], 1, 16)
    variables = module.init(jax.random.key(0), frozen, packed)
    assert set(variables["params"]) == {"meta_embedding"}
    # Meta embeddings that equal rows of the model's table must act as those tokens do.
    ids = np.array([3, 9, 4])
    variables = {"params": {"meta_embedding": frozen["embed"]["embedding"][ids]}}
    got = module.apply(variables, frozen, packed)[0]
    tokens = np.concatenate([packed.tokens_BT[0, :4], ids]).astype(np.int32)[None]
    hidden, _ = Decoder(config).apply({"params": frozen}, tokens)
    np.testing.assert_allclose(got, hidden[0, 4:], **SAME)


def test_a_shared_meta_token_is_one_embedding_at_every_slot(frozen):
    module = CloudEncoder(Decoder(CLOUD), L, dataclasses.replace(SETTINGS, shared_meta_token=True))
    variables = module.init(jax.random.key(0), frozen, prompts_of([4], 1, 16))
    assert variables["params"]["meta_embedding"].shape == (1, CLOUD.width)
    repeated = {**variables["params"], "meta_embedding": jnp.repeat(variables["params"]["meta_embedding"], L, axis=0)}
    plain = CloudEncoder(Decoder(CLOUD), L, SETTINGS)
    packed = prompts_of([4, 6], 1, 24)
    one, other = module.apply(variables, frozen, packed), plain.apply({"params": repeated}, frozen, packed)
    np.testing.assert_allclose(one, other, **SAME)


def test_packing_places_prompts_and_meta_slots_by_hand():
    packed = pack_prompts([[5, 6], [7], [8, 9, 4], [3]], 2, 2, 9)
    np.testing.assert_array_equal(packed.tokens_BT, [[5, 6, 0, 0, 7, 0, 0, 0, 0], [8, 9, 4, 0, 0, 3, 0, 0, 0]])
    np.testing.assert_array_equal(packed.positions_BT, [[0, 1, 2, 3, 0, 1, 2, -1, -1], [0, 1, 2, 3, 4, 0, 1, 2, -1]])
    np.testing.assert_array_equal(packed.segments_BT, [[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 2, 2, 2, 0]])
    np.testing.assert_array_equal(packed.meta_BT, [[-1, -1, 0, 1, -1, 0, 1, -1, -1], [-1, -1, -1, 0, 1, -1, 0, 1, -1]])
    np.testing.assert_array_equal(packed.slots_BML, [[[2, 3], [5, 6]], [[3, 4], [6, 7]]])


def test_an_empty_prompt_is_refused():
    with raises(DataError, "prompts"):
        pack_prompts([[1, 2], []], 2, 1, 16)


def test_prompts_that_do_not_fit_are_refused_with_their_length():
    with raises(DataError, "prompts", 7, 4, 10):
        pack_prompts([[1, 2, 3], [4, 5, 6, 7]], 2, 1, 10)


@pytest.mark.parametrize("name", list(GENERATORS))
def test_specializing_several_prompts_at_once_gives_each_its_own_adapter(name, frozen, generators):
    """Three prompts are padded to four rows; the added row leaves no trace."""
    generator, variables = generators(name)
    prompts = token_rows([5, 14, 9], CLOUD.vocab_size, seed=4)
    together = specialize(generator, variables, frozen, prompts)
    for p, prompt in enumerate(prompts):
        alone = specialize(generator, variables, frozen, [prompt])
        one, other = together.adapter.select(p), alone.adapter
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **SAME), one, other)
    if name == "direct":
        assert isinstance(together.adapter, PromptLoRA)
        assert together.gates is None
        assert together.adapter.scanned["up"]["a"].shape == (L, 3, EDGE.width, SETTINGS.rank)
    else:
        assert isinstance(together.adapter, GatedPool)
        assert together.gates.shape == (3, L, SETTINGS.num_experts)
        gates = np.asarray(together.gates.dense())
        np.testing.assert_array_equal(together.adapter.gates.dense(), gates.transpose(1, 0, 2))
        assert np.all(np.count_nonzero(gates, axis=-1) == (4 if name == "gumbel" else 2))


def test_specializing_has_no_dropout_and_is_deterministic(frozen, generators):
    generator, variables = generators("shared")
    dropping = LoRAGen(Decoder(CLOUD), EDGE, dataclasses.replace(SETTINGS, dropout=0.5))
    prompts = token_rows([6], CLOUD.vocab_size)
    first, second = (specialize(dropping, variables, frozen, prompts) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    calm = specialize(generator, variables, frozen, prompts)
    np.testing.assert_allclose(first.gates.weight, calm.gates.weight, **SAME)


def test_prompts_of_one_length_bucket_compile_once(frozen, generators):
    generator, variables = generators("shared")
    specialize(generator, variables, frozen, token_rows([5], CLOUD.vocab_size))
    count = specializing._generate._cache_size()
    for n in (1, 9, 13):
        specialize(generator, variables, frozen, token_rows([n], CLOUD.vocab_size, seed=n))
    assert specializing._generate._cache_size() == count


def test_a_prompt_beyond_the_limit_or_the_models_positions_is_refused(frozen, generators):
    generator, variables = generators("shared")
    long = token_rows([5, 62], CLOUD.vocab_size)
    with raises(DataError, "prompts.1", "prompt 1", 62, 61, 3):
        specialize(generator, variables, frozen, long)
    with raises(DataError, "prompts.0", "prompt 0", 5, 4):
        specialize(generator, variables, frozen, long[:1], limit=4)
    # The longest that fits is read.
    assert specialize(generator, variables, frozen, [long[1][:61]]).gates.shape == (1, L, 4)


@pytest.mark.parametrize("prompts", [[[]], [[4, 5], []]])
def test_specializing_an_empty_prompt_is_refused(frozen, prompts, generators):
    generator, variables = generators("shared")
    with raises(DataError, "prompts"):
        specialize(generator, variables, frozen, prompts)


def test_specializing_nothing_is_refused(frozen, generators):
    generator, variables = generators("shared")
    with raises(DataError, "prompts"):
        specialize(generator, variables, frozen, [])


@pytest.mark.parametrize("bad", [-1, CLOUD.vocab_size])
def test_a_prompt_with_a_token_beyond_the_clouds_embedding_is_refused(frozen, bad, generators):
    generator, variables = generators("shared")
    with raises(DataError, "prompts.1", bad, "0 to 52"):
        specialize(generator, variables, frozen, [[4, 5], [6, bad]])


@pytest.mark.parametrize(("edge", "pool"), [(EDGE, "shared"), (EDGE, "per_layer"), (OPT, "shared")])
def test_a_fresh_pool_changes_nothing_and_a_is_kaiming_uniform(pool, edge):
    layers = edge.num_layers if pool == "per_layer" else None
    names = ExpertPool(edge.ffn_shapes, 4, 3, layers).init(jax.random.key(0))["params"]
    assert {name[:-2] for name in names} == set(edge.ffn_sites)
    lead = (L, 4) if pool == "per_layer" else (4,)
    for site in edge.ffn_sites:
        a, b = names[f"{site}_a"], names[f"{site}_b"]
        inputs, outputs = edge.site_shape(site)
        assert a.shape == (*lead, inputs, 3)
        assert b.shape == (*lead, 3, outputs)
        assert not np.any(b)
        bound = inputs**-0.5
        assert 0.8 * bound < np.max(np.abs(a)) <= bound


def test_stacked_factors_are_initialized_as_each_alone_would_be():
    """Kaiming-uniform with a = √5 is U(±1/√inputs), whatever stands before the matrix's two axes."""
    for shape in ((400, 8), (6, 400, 8), (2, 3, 400, 8)):
        a = np.asarray(factor_a_init(jax.random.key(0), shape))
        assert np.max(np.abs(a)) <= 0.05
        assert abs(np.std(a) - 0.05 / np.sqrt(3)) < 0.05 * 0.02


@pytest.mark.parametrize("count", [L - 1, L + 1])
def test_prompts_packed_for_another_edge_model_are_refused(encoder, frozen, count):
    with raises(ConfigError, "prompts", count, L):
        meta_tokens(encoder, frozen, pack_prompts([[5, 6]], count, 1, 16))
