"""AutoCompressors against a slow rendering: one prompt, one segment at a time, without padding, by plain passes."""

import dataclasses
from typing import Any, NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EDGE, SAME, filled, raises, random_params, token_rows

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import CompressorConfig, Config, DataConfig
from lora_gen_jax.data.groups import Group
from lora_gen_jax.data.pipeline import edge_prompts, pack_groups
from lora_gen_jax.decoder.flash import BLOCK
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.generator.cloud import PackedPrompts
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.prefix import compress, encode_soft
from lora_gen_jax.inference.rows import Request
from lora_gen_jax.inference.scoring import score
from lora_gen_jax.methods.autocompressor import (
    LARGEST,
    SMALLEST,
    AutoCompressor,
    build,
    longest_segment,
    segment_lengths,
    specialize,
    take_segment,
)
from lora_gen_jax.methods.method import Prompt
from lora_gen_jax.training.optimizer import decayed
from lora_gen_jax.training.step import objective

pytestmark = pytest.mark.float64
# Compiling is all that these tests cost: few layers, and few with a LoRA.
LLAMA = dataclasses.replace(EDGE, num_layers=1)
# Learned positions, and Gemma's scale of the embeddings.
OPT = dataclasses.replace(helpers.OPT, num_layers=2, embedding_scale=2.0)
SETTINGS = dataclasses.replace(helpers.SETTINGS, lora_sites=("k", "o"))
COMPRESSOR = CompressorConfig(summary_tokens=3, segments=4, substep=2)
SHORT = dataclasses.replace(COMPRESSOR, segments=2)
CUTS = [[5, 6, 6], [2, 2, 0]]
PROMPTS = token_rows([17, 4, 1], LLAMA.vocab_size, seed=5)
KEY = jax.random.key(3)


def prompts_of(rows, length=20):
    return PackedPrompts(None, None, None, None, None, edge_PX=edge_prompts(rows, length))


def variables_of(module, base):
    """Params away from their start, where B is zero and all summary tokens are alike."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), base, prompts_of(PROMPTS))
    return {"params": filled(shapes["params"], 3)}


class Rendering(NamedTuple):
    """What the slow rendering reads with; `adapter` None where the LoRA is merged into `base`.

    Learned positions are added by hand, to a model whose table of them is all zeros: the n-th token of a segment has
    the table's n-th row, and soft and summary tokens have none.
    """

    decoder: Decoder
    base: Any
    adapter: Any
    summary_KD: Any

    def embed(self, ids):
        x_TD = self.decoder.apply({"params": self.base}, np.array([ids], np.int32), method="embed")[0]
        if "positions" not in self.base:
            return x_TD
        offset = self.decoder.config.learned_position_offset
        return x_TD + self.base["positions"]["embedding"][offset : offset + len(ids)]

    def hidden(self, parts):
        x_TD = jnp.concatenate(parts)
        positions_1T = jnp.arange(len(x_TD), dtype=jnp.int32)[None]
        bare = {"positions": jax.tree.map(jnp.zeros_like, self.base["positions"])} if "positions" in self.base else {}
        variables = {"params": {**self.base, **bare}}
        hidden, _ = self.decoder.apply(variables, x_TD[None], positions_1T, adapter=self.adapter, method="encode")
        return hidden[0]

    def nll(self, hidden_TD, ids):
        """-log p of each id, [T]."""
        logits_TV = self.decoder.apply({"params": self.base}, hidden_TD[None], method="logits")[0]
        return -jax.nn.log_softmax(logits_TV)[np.arange(len(ids)), np.array(ids, np.int32)]

    def compress(self, ids, lengths, detached=None):
        """Soft tokens and the loss of every token but the first.

        `detached` has soft tokens without a gradient, and for every segment, the queries included, whether it reads
        those.
        """
        K, losses, at = len(self.summary_KD), [], 0
        soft_ND = jnp.zeros((0, self.decoder.config.width))
        scale = jnp.asarray(self.decoder.config.embedding_scale, float)
        for i, length in enumerate(lengths):
            soft_ND = soft_ND if detached is None else jnp.where(detached[1][i], detached[0][: i * K], soft_ND)
            hidden_TD = self.hidden([soft_ND, self.embed(ids[at : at + length]), self.summary_KD * scale])
            following = ids[at + 1 : at + 1 + length]
            losses.append(self.nll(hidden_TD[i * K :][: len(following)], following))
            soft_ND, at = jnp.concatenate([soft_ND, hidden_TD[i * K + length :]]), at + length
        soft_ND = soft_ND if detached is None else jnp.where(detached[1][-1], detached[0], soft_ND)
        return soft_ND, jnp.concatenate(losses)

    def answer(self, soft_ND, query, response):
        """-log p of each token of a response to a query behind soft tokens."""
        hidden_TD = self.hidden([soft_ND, self.embed([*query, *response[:-1]])])
        return self.nll(hidden_TD[-len(response) :], response)


def rendering_of(module, base, params, merged=False):
    adapter: Any = module.apply({"params": params}, None, None).adapter
    model = (merge(base, adapter), None) if merged else (base, adapter)
    return Rendering(Decoder(module.edge), *model, params["summary_embedding"])


def rendered(module, base, variables, cuts):
    """Of each prompt, with the LoRA merged: soft tokens and losses."""
    rendering = rendering_of(module, base, variables["params"], merged=True)
    pieces = zip(PROMPTS, cuts, strict=False)
    return jax.jit(lambda: [rendering.compress(ids, lengths) for ids, lengths in pieces])()


def cuts_of(module, edge_PX, key):
    return np.asarray(module.apply({}, edge_PX, True, rngs={"dropout": key}, method="lengths"))


@pytest.fixture(scope="module")
def llama():
    module, base = AutoCompressor(Decoder(LLAMA), SETTINGS, COMPRESSOR), random_params(LLAMA, 4)
    return module, base, variables_of(module, base)


def test_a_batch_equals_each_prompt_alone_segment_by_segment():
    module, base = AutoCompressor(Decoder(OPT), SETTINGS, COMPRESSOR), random_params(OPT, 4)
    variables = variables_of(module, base)
    got = jax.jit(module.apply)(variables, base, prompts_of(PROMPTS[:2]))
    assert got.losses is None
    assert got.soft_PND.shape == (2, 9, OPT.width)
    for soft_ND, (want_ND, _) in zip(got.soft_PND, rendered(module, base, variables, CUTS), strict=True):
        np.testing.assert_allclose(soft_ND, want_ND, **SAME)


def test_training_reads_random_segments_and_weighs_every_token_alike(llama):
    _, base, variables = llama
    module = AutoCompressor(Decoder(LLAMA), SETTINGS, dataclasses.replace(COMPRESSOR, segments=3))
    got = jax.jit(module.apply, static_argnums=3)(variables, base, prompts_of(PROMPTS), True, rngs={"dropout": KEY})
    cuts = cuts_of(module, prompts_of(PROMPTS).edge_PX, KEY).tolist()
    assert len(set(cuts[0])) > 1, "an even cut would not show a mix-up of segments"
    want = rendered(module, base, variables, cuts)
    for soft_ND, (want_ND, _) in zip(got.soft_PND, want, strict=True):
        np.testing.assert_allclose(soft_ND, want_ND, **SAME)
    losses = jnp.concatenate([losses for _, losses in want])
    assert len(losses) == 16 + 3
    np.testing.assert_allclose(got.losses["segments"], jnp.mean(losses), **SAME)


@pytest.mark.parametrize("segments", [1, 3])
def test_segments_cover_every_token_once(segments):
    tokens = np.repeat(np.array([*range(1, 12), 40], np.int32), 20)
    P, longest = len(tokens), longest_segment(41, segments, even=False)
    shares = np.random.default_rng(0).integers(SMALLEST, LARGEST + 1, (P, segments)).astype(np.int32)
    # The extremes: one segment as long, and one as short, as can be.
    shares[::20], shares[1::20] = SMALLEST, LARGEST
    shares[::20, -1], shares[1::20, 0] = LARGEST, SMALLEST
    lengths = np.asarray(segment_lengths(jnp.asarray(tokens), jnp.asarray(shares)))
    assert (lengths.sum(1) == tokens).all()
    assert lengths[tokens >= 2 * segments].min() >= 2
    for n in np.unique(tokens):
        assert lengths[tokens == n].max() <= longest_segment(int(n), segments, even=False) <= longest
    at_PX = np.arange(41, dtype=np.int32)[None]
    edge_PX = jnp.asarray(np.where(at_PX < tokens[:, None], 7 + at_PX, -1).astype(np.int32))
    starts, read, followed = np.cumsum(lengths, 1) - lengths, [[] for _ in tokens], [[] for _ in tokens]
    for i in range(segments):
        segment = take_segment(edge_PX, jnp.asarray(starts[:, i]), jnp.asarray(lengths[:, i]), longest)
        tokens_PS, next_PS, weight_PS = (np.asarray(segment[k]) for k in (0, 2, 3))
        for p in range(P):
            read[p] += tokens_PS[p, : lengths[p, i]].tolist()
            followed[p] += next_PS[p][weight_PS[p] == 1].tolist()
    assert read == [list(range(7, 7 + n)) for n in tokens]
    assert followed == [list(range(8, 7 + n)) for n in tokens]


def test_the_longest_segment_is_reached():
    even = segment_lengths(jnp.array([23]), jnp.ones((1, 3), jnp.int32))
    assert int(even.max()) == longest_segment(23, 3, even=True) == 8
    uneven = segment_lengths(jnp.array([106]), jnp.array([[SMALLEST, SMALLEST, LARGEST]]))
    assert int(uneven.max()) == longest_segment(106, 3, even=False) == 62


def test_training_cuts_at_random_anew_for_every_prompt_and_key(llama):
    module = llama[0]
    edge_PX = jnp.full((20, 60), 5, jnp.int32)

    first = cuts_of(module, edge_PX, KEY)
    assert len(np.unique(first, axis=0)) > 10
    assert first.max() > 26
    assert first.min() < 14
    assert (first.sum(1) == 60).all()
    np.testing.assert_array_equal(cuts_of(module, edge_PX, KEY), first)
    assert (cuts_of(module, edge_PX, jax.random.key(4)) != first).any()
    assert (module.apply({}, edge_PX, False, method="lengths") == 20).all()


GROUP = Group("", (), [5], [([3, 9, 11], [4, 8])], edge_prompt=PROMPTS[0])
DATA = DataConfig(cloud_length=8, edge_length=12, response_slots=6, edge_prompt_length=20, query_length=12)
BATCH = pack_groups([GROUP], DATA, LLAMA.num_layers)
# Which segments begin a substep, the queries being the fourth.
BEGIN = {2: [True, False, True, False], 4: [True, False, False, False]}


@pytest.fixture(scope="module")
def slow_gradients(llama):
    """The whole objective's value, the prompt's part of it and its gradient by substep, rendered slowly."""
    module, base, variables = llama
    lengths = cuts_of(module, BATCH.prompts.edge_PX, jax.random.split(KEY, 3)[0])[0].tolist()

    def loss_fn(params, detached):
        rendering = rendering_of(module, base, params)
        soft_ND, losses = rendering.compress(GROUP.edge_prompt, lengths, detached)
        prompt = jnp.mean(losses)
        return jnp.mean(rendering.answer(soft_ND, *GROUP.queries[0])) + prompt, (prompt, soft_ND)

    gradient_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    constant = jnp.zeros((9, LLAMA.width))
    # What is constant for the gradient is the value itself.
    constant = gradient_fn(variables["params"], (constant, jnp.zeros(4, bool)))[0][1][1]
    return {k: gradient_fn(variables["params"], (constant, jnp.array(begin))) for k, begin in BEGIN.items()}


@pytest.mark.parametrize(("substep", "remat"), [(2, "none"), (4, "full")])
def test_the_objective_and_its_gradient_within_substeps(llama, slow_gradients, substep, remat):
    """Segments 1 and 2 are constants for 3 and the queries with substeps of 2; in one substep of 4 all are linked."""
    base, variables = llama[1:]
    compressor = dataclasses.replace(COMPRESSOR, substep=substep)
    module = AutoCompressor(Decoder(LLAMA, remat=remat), SETTINGS, compressor)
    loss_fn = objective(module, Decoder(LLAMA), Config(generator=SETTINGS, data=DATA, compressor=compressor))
    gradient_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, (_, metrics)), got = gradient_fn(variables["params"], {}, {"edge": base}, BATCH, KEY)
    (want_loss, (prompt_loss, _)), want = slow_gradients[substep]
    np.testing.assert_allclose(loss, want_loss, **SAME)
    np.testing.assert_allclose(metrics["segment_loss"], prompt_loss, **SAME)
    np.testing.assert_allclose(metrics["loss"], want_loss - prompt_loss, **SAME)
    for name, gradient in want.items():
        np.testing.assert_allclose(got[name], gradient, **SAME)
    # With the other substep all would differ.
    for name, gradient in slow_gradients[6 - substep][1].items():
        size = float(jnp.max(jnp.abs(want[name])))
        assert float(jnp.max(jnp.abs(gradient - want[name]))) > 1e-3 * size, name


def test_queries_that_begin_a_substep_read_constants(llama):
    _, base, variables = llama
    module = AutoCompressor(Decoder(LLAMA), SETTINGS, dataclasses.replace(SHORT, substep=1))

    def total(params):
        soft_PND: Any = module.apply({"params": params}, base, BATCH.prompts).soft_PND
        return jnp.sum(jnp.square(soft_PND))

    size, gradient = jax.jit(jax.value_and_grad(total))(variables["params"])
    assert size > 1
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_dropout_needs_training_and_follows_its_key(llama):
    # One segment: the cut is the same whatever the key.
    module, (_, base, variables) = (
        AutoCompressor(Decoder(LLAMA), dataclasses.replace(SETTINGS, dropout=0.5), SHORT),
        llama,
    )
    read = jax.jit(lambda key: module.apply(variables, base, BATCH.prompts, True, rngs={"dropout": key}).soft_PND)
    first, second = read(KEY), read(jax.random.key(4))
    np.testing.assert_array_equal(read(KEY), first)
    assert np.abs(first - second).max() > 0.01
    # It would ask for a key.
    jax.eval_shape(module.apply, variables, base, BATCH.prompts)


def test_summary_tokens_start_from_the_end_token(llama):
    _, base, _ = llama
    module = AutoCompressor(Decoder(LLAMA), helpers.SETTINGS, COMPRESSOR, end_id=2)
    params = jax.jit(module.init)(KEY, base, None)["params"]
    np.testing.assert_array_equal(params["summary_embedding"], np.tile(base["embed"]["embedding"][2], (3, 1)))
    names = [f"{site}_{x}" for site in "koqv" for x in "ab"]
    assert set(params) == {*names, "summary_embedding"}
    assert all(bool(np.any(params[name])) == name.endswith("a") for name in names)
    assert [name for name, yes in decayed(params).items() if not yes] == ["summary_embedding"]
    without = module.clone(end_id=None).init(KEY, None, None)["params"]["summary_embedding"]
    assert 0.01 < float(np.std(without)) < 0.03


@pytest.mark.usefixtures("float32")
def test_shapes_alone_are_enough_and_the_compute_type_is_kept():
    """bfloat16 weights, dropout and the flash kernel's whole blocks, traced with its gradient and never run."""
    config = Config(generator=dataclasses.replace(SETTINGS, dropout=0.1), data=DATA, compressor=COMPRESSOR)
    module = AutoCompressor(Decoder(LLAMA, jnp.bfloat16, "dots"), config.generator, COMPRESSOR, 2)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), random_params(LLAMA))
    params = jax.eval_shape(module.init, KEY, base, BATCH.prompts)["params"]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    gradient_fn = jax.grad(objective(module, Decoder(LLAMA, jnp.bfloat16), config), has_aux=True)
    gradient, _ = jax.eval_shape(gradient_fn, params, {}, {"edge": base}, BATCH, KEY)
    assert gradient == params
    soft = jax.eval_shape(lambda p, b: module.apply({"params": p}, b, BATCH.prompts).soft_PND, params, base)
    assert (soft.shape, soft.dtype) == ((1, 9, LLAMA.width), jnp.float32)
    flash = module.clone(decoder=module.decoder.clone(attention="splash"))
    assert all((3 * i + flash._slots(300, 3 * i, True) + 3) % BLOCK == 0 for i in range(3))


def test_without_prompts_it_is_the_lora_and_without_edge_prompts_an_error(llama):
    module, base, variables = llama
    assert module.apply(variables, None, None).soft_PND is None
    with raises(ConfigError, "data.edge_prompt_length", "data.edge_prompt_length"):
        module.apply(variables, base, PackedPrompts(*[None] * 5))


def test_a_query_behind_the_prefix_of_soft_tokens_equals_one_forward_pass():
    module, base = AutoCompressor(Decoder(OPT), SETTINGS, COMPRESSOR), random_params(OPT, 4)
    rendering = rendering_of(module, base, variables_of(module, base)["params"])
    soft_ND = jnp.asarray(np.random.default_rng(0).standard_normal((7, OPT.width)))
    prefix = encode_soft(EdgeModel(rendering.decoder, base, adapter=rendering.adapter), soft_ND)
    assert (prefix.length, prefix.positions, prefix.ids) == (7, 0, ())
    assert prefix.cache.position_BS.shape == (1, 16)
    requests = [Request([3, 9, 11], [[4, 8], [5]])]
    got = score(EdgeModel(rendering.decoder, base, adapter=rendering.adapter, prefix=prefix), requests, batch_tokens=64)
    answer = jax.jit(lambda: [[rendering.answer(soft_ND, q, r) for r in responses] for q, responses in requests])
    for want, scored in zip(answer(), got, strict=True):
        np.testing.assert_allclose(scored.logprobs, [-x.sum() for x in want], **SAME)


def test_what_is_generated_behind_soft_tokens_is_what_one_forward_pass_says():
    """Greedily, by the slow rendering; the model's positions are counted from the query on."""
    config = dataclasses.replace(OPT, max_positions=16)
    module, base = AutoCompressor(Decoder(config), SETTINGS, COMPRESSOR), random_params(config, 4)
    rendering = rendering_of(module, base, variables_of(module, base)["params"], merged=True)
    soft_ND = jnp.asarray(np.random.default_rng(0).standard_normal((30, config.width)))
    prefix, query = encode_soft(EdgeModel(rendering.decoder, rendering.base), soft_ND), [3, 9, 11]
    (made,) = generate(
        EdgeModel(rendering.decoder, rendering.base, prefix=prefix), [query], GenerationSettings(max_new_tokens=13)
    )
    read = jax.jit(lambda: rendering.answer(soft_ND, query, made.ids))()
    np.testing.assert_allclose(made.logprobs, -read, **SAME)
    # Of the greedy tokens none is less likely than another of the vocabulary would be on average.
    assert float(jnp.max(read)) < np.log(config.vocab_size)
    with raises(DataError, "tokens", 17, 16):
        generate(
            EdgeModel(rendering.decoder, rendering.base, prefix=prefix), [query], GenerationSettings(max_new_tokens=14)
        )


def test_learned_positions_are_those_of_a_segments_own_tokens_in_training_too():
    """The whole objective on OPT, queries that share a row included, by the slow rendering."""
    module, base = AutoCompressor(Decoder(OPT), SETTINGS, SHORT), random_params(OPT, 4)
    variables = variables_of(module, base)
    queries = [([3, 9, 11], [4, 8]), ([7, 5], [6])]
    batch = pack_groups([dataclasses.replace(GROUP, queries=queries)], DATA, OPT.num_layers)
    loss_fn = objective(module, Decoder(OPT), Config(generator=SETTINGS, data=DATA, compressor=SHORT))
    _, (_, metrics) = jax.jit(loss_fn)(variables["params"], {}, {"edge": base}, batch, KEY)
    rendering = rendering_of(module, base, variables["params"])

    @jax.jit
    def slow():
        soft_ND, losses = rendering.compress(GROUP.edge_prompt, [17])
        return jnp.mean(losses), jnp.concatenate([rendering.answer(soft_ND, *query) for query in queries])

    segments, answers = slow()
    np.testing.assert_allclose(metrics["segment_loss"], segments, **SAME)
    np.testing.assert_allclose(metrics["loss"], jnp.mean(answers), **SAME)


def test_soft_tokens_take_no_positions_of_a_learned_table(llama):
    """A prompt and a query may each be as long as the table, whatever the number of soft tokens."""
    config = Config(generator=SETTINGS, compressor=SHORT, data=DATA)
    learned = dataclasses.replace(OPT, max_positions=40)
    rotary = dataclasses.replace(LLAMA, max_positions=40)
    for edge, fits in ((learned, True), (rotary, False)):
        pair = pair_of(llama[1], decoder=Decoder(edge))
        data = dataclasses.replace(DATA, edge_prompt_length=40, query_length=40)
        for changed in (data, dataclasses.replace(data, edge_prompt_length=20)):
            whole = dataclasses.replace(config, data=changed)
            if fits:
                assert build(whole, pair).edge == edge
            else:
                field = "edge_prompt_length" if changed.edge_prompt_length == 40 else "query_length"
                with raises(ConfigError, f"data.{field}", 3, 43):
                    build(whole, pair)
        data = dataclasses.replace(data, edge_prompt_length=20, query_length=41)
        with raises(ConfigError, "data.query_length", 41 if fits else 44):
            build(dataclasses.replace(config, data=data), pair)


def test_errors_of_soft_tokens(llama):
    _, base, _ = llama
    decoder = Decoder(LLAMA)
    for shape, code in (((0, 16), "empty"), ((64, 16), "too long"), ((3, 20), "width")):
        with raises(DataError, "soft_ND", code=code):
            encode_soft(EdgeModel(decoder, base), jnp.zeros(shape))


def test_compress_pads_to_few_lengths_and_says_what_it_cannot_read(llama, monkeypatch):
    module, (_, base, variables) = AutoCompressor(Decoder(LLAMA), SETTINGS, SHORT), llama
    traced = []
    count = AutoCompressor.lengths
    monkeypatch.setattr(
        AutoCompressor, "lengths", lambda self, x, train: traced.append(x.shape) or count(self, x, train)
    )
    for ids in (PROMPTS[0], PROMPTS[0][:16], PROMPTS[1]):
        compress(module, variables, base, ids)
    assert traced == [(1, 32), (1, 16)]
    ((want_ND, _),) = rendered(module, base, variables, [[17]])
    np.testing.assert_allclose(compress(module, variables, base, PROMPTS[0]), want_ND, **SAME)
    # 9 soft tokens and a third of the prompt are read in 64 positions.
    assert llama[0].positions(165) == module.positions(61) == 64
    assert compress(module, variables, base, [5] * 61).shape == (3, LLAMA.width)
    for ids, code, *facts in (([], "empty"), ([5] * 62, "too long", 62, 65), ([53], "unknown id", 53)):
        with raises(DataError, "prompt", *facts, code=code):
            compress(module, variables, base, ids)


class _Words:
    end = 2

    def prompt(self, text):
        return [ord(c) - ord("a") + 3 for c in text]


def pair_of(base, encoder=None, decoder=None):
    from lora_gen_jax.models import Model, Pair

    model = Model(decoder or Decoder(LLAMA), base, encoder, "")
    return Pair(model, model)


def test_build_refuses_what_the_edge_cannot_read(llama):
    pair = pair_of(llama[1], _Words())
    config = Config(generator=SETTINGS, compressor=COMPRESSOR, data=DATA)
    assert build(config, pair).end_id == 2
    assert build(config, pair_of(llama[1])).end_id is None
    for field, length in (("edge_prompt_length", 120), ("query_length", 56)):
        data = dataclasses.replace(config.data, **{field: length})
        with raises(ConfigError, f"data.{field}", "9 soft tokens"):
            build(dataclasses.replace(config, data=data), pair)


def test_specialized_is_the_merged_edge_behind_the_soft_tokens(llama):
    module, base, variables = llama
    config = Config(generator=SETTINGS, compressor=SHORT, data=DATA, method="autocompressor")

    class Run(NamedTuple):
        variables: Any
        config: Config
        path: str = "run"

    make = specialize(config, pair_of(base, _Words()), Run(variables, config))
    plain, special = make(None), make(Prompt("abacus", (), False))
    assert (plain.prefix, plain.adapter) == (None, None)
    assert special.params is plain.params
    rendering = rendering_of(module, base, variables["params"], merged=True)

    @jax.jit
    def answers():
        soft_ND, _ = rendering.compress(_Words().prompt("abacus"), [6])
        return [rendering.answer(x, [3, 9, 11], [4, 8]).sum() for x in (soft_ND, soft_ND[:0])]

    for found, want in zip((special, plain), answers(), strict=True):
        got = score(found, [Request([3, 9, 11], [[4, 8]])], batch_tokens=64)
        np.testing.assert_allclose(got[0].logprobs, [-want], **SAME)
