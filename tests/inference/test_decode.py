"""Generation against the plain loop: one full forward pass per token, no cache, no batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SAME, raises
from inference_models import CONFIGS, make_gates, make_model

from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.inference import decode
from lora_gen_jax.inference.decode import GenerationSettings, generate, stream
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.prefix import encode_prefix
from lora_gen_jax.inference.sampling import Sampling

pytestmark = pytest.mark.float64
PROMPTS = [[5, 9, 60, 3, 22, 8, 41], [1, 2], [33, 7, 50, 12]]


def plain_greedy(model, prompt, new_tokens, adapter=None):
    """Ids and log-probabilities by one full forward pass per token."""
    ids, logprobs = list(prompt), []
    for _ in range(new_tokens):
        logits = model.logits(ids, adapter)[-1]
        ids.append(int(logits.argmax()))
        logprobs.append(float(jax.nn.log_softmax(logits)[ids[-1]]))
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_equals_the_full_forward_pass(model, side):
    decoder, params = model
    sequences = [[*p, 11, 4, 66, 30, 2] for p in PROMPTS]
    tokens, positions = np.zeros((3, 8), np.int32), np.full((3, 8), -1, np.int32)
    for row, p in enumerate(PROMPTS):
        where = slice(8 - len(p), 8) if side == "left" else slice(0, len(p))
        tokens[row, where], positions[row, where] = p, np.arange(len(p))
    cache = KVCache.empty(decoder.config, 3, 16, float)
    step = jax.jit(lambda *a: decoder.apply({"params": params}, a[0], a[1], cache=a[2]))
    logits = jax.jit(lambda hidden: decoder.apply({"params": params}, hidden, method="logits"))
    hidden, cache = step(tokens, positions, cache)
    for i in range(6):
        last = positions.argmax(1) if i == 0 else np.zeros(3, int)
        got = logits(hidden[np.arange(3), last][:, None])[:, 0]
        for row, p in enumerate(PROMPTS):
            want = model.logits(sequences[row])[len(p) - 1 + i]
            np.testing.assert_allclose(got[row], want, **SAME)
        if i < 5:
            at = np.array([[len(p) + i] for p in PROMPTS], np.int32)
            token = np.array([[s[len(p) + i]] for s, p in zip(sequences, PROMPTS, strict=True)], np.int32)
            hidden, cache = step(token, at, cache)


def test_greedy_generation_equals_the_plain_loop(model):
    # 20 new tokens reach past Gemma 2's window of 4 and past the prompts' bucket of 16.
    for prompt, got in zip(
        PROMPTS, generate(model.edge(), PROMPTS, GenerationSettings(max_new_tokens=20)), strict=True
    ):
        ids, logprobs = plain_greedy(model, prompt, 20)
        assert got.ids == ids
        assert got.finish == "length"
        np.testing.assert_allclose(got.logprobs, logprobs, **SAME)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_each_row_follows_its_own_prompts_gates(family):
    model = make_model(CONFIGS[family])
    adapter = make_gates(model.decoder.config, prompts=3)
    rows = [p for p in PROMPTS for _ in range(2)]
    together = generate(model.edge(adapter), rows, GenerationSettings(max_new_tokens=8))
    for i, prompt in enumerate(PROMPTS):
        ids, _ = plain_greedy(model, prompt, 8, adapter.select(i))
        assert together[2 * i].ids == together[2 * i + 1].ids == ids
        assert ids != plain_greedy(model, prompt, 8)[0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 20, 0.95)])
def test_a_row_does_not_depend_on_the_batch(llama, sampling):
    options = {"max_new_tokens": 10, "sampling": sampling, "seed": 3}
    alone = generate(llama.edge(), PROMPTS[:1], GenerationSettings(**options))[0]
    assert generate(llama.edge(), PROMPTS, GenerationSettings(**options))[0].ids == alone.ids
    assert generate(llama.edge(), [PROMPTS[0], list(range(40))], GenerationSettings(**options))[0].ids == alone.ids


def test_seeds_differ_and_repeat(llama):
    def draw(seed):
        return generate(llama.edge(), PROMPTS, GenerationSettings(max_new_tokens=12, sampling=Sampling(1.0), seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_stop_ids_end_a_row_and_are_left_out(llama):
    free = generate(llama.edge(), PROMPTS, GenerationSettings(max_new_tokens=12))
    stop = free[0].ids[5]
    for row, got in zip(
        free, generate(llama.edge(), PROMPTS, GenerationSettings(max_new_tokens=12, stop_ids=[66, stop])), strict=True
    ):
        hits = [i for i, token in enumerate(row.ids) if token in (66, stop)]
        assert got.ids == row.ids[: hits[0]] if hits else row.ids
        assert got.finish == ("stop" if hits else "length")
        assert len(got.logprobs) == len(got.ids)


def test_a_stop_id_drawn_first_gives_no_ids(llama):
    first = generate(llama.edge(), PROMPTS[:1], GenerationSettings(max_new_tokens=1))[0]
    assert first.finish == "length"
    got = generate(llama.edge(), PROMPTS[:1], GenerationSettings(max_new_tokens=5, stop_ids=first.ids))[0]
    assert (got.ids, got.finish) == ([], "stop")
    assert list(stream(llama.edge(), PROMPTS[:1], GenerationSettings(max_new_tokens=5, stop_ids=first.ids))) == []


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9)])
def test_the_stream_gives_the_same_tokens(llama, sampling):
    free = generate(llama.edge(), PROMPTS, GenerationSettings(max_new_tokens=12, sampling=sampling))
    options = {"max_new_tokens": 12, "sampling": sampling, "stop_ids": [free[0].ids[4], free[1].ids[6]]}
    want = generate(llama.edge(), PROMPTS, GenerationSettings(**options))
    steps = list(stream(llama.edge(), PROMPTS, GenerationSettings(**options)))
    for row, generation in enumerate(want):
        assert [step[row] for step in steps if step[row] is not None] == generation.ids
    assert len(steps) == max(len(generation.ids) for generation in want)


@pytest.mark.parametrize("family", ["gemma2", "opt"])
def test_a_prefix_is_read_once_and_changes_nothing(family):
    model = make_model(CONFIGS[family])
    adapter = make_gates(model.decoder.config, prompts=1)
    shots = [7, 7, 12, 50, 31, 2, 18, 40, 3]
    prefix = encode_prefix(model.edge(adapter), shots)
    got = generate(model.edge(adapter, prefix), PROMPTS, GenerationSettings(max_new_tokens=10))
    want = generate(model.edge(adapter), [shots + p for p in PROMPTS], GenerationSettings(max_new_tokens=10))
    assert [g.ids for g in got] == [w.ids for w in want]


def test_one_compilation_per_bucket(llama):
    def programs():
        return decode._prefill._cache_size(), decode._decode._cache_size()

    jax.clear_caches()
    generate(llama.edge(), [[1, 2, 3]] * 3, GenerationSettings(max_new_tokens=5))
    assert programs() == (1, 1)
    # Within the buckets: 4 rows, 16 prompt tokens, 32 slots. Settings, stop ids and seeds change nothing either.
    generate(
        llama.edge(),
        [[4] * 16] * 4,
        GenerationSettings(max_new_tokens=16, stop_ids=[1, 2, 3], sampling=Sampling(1.0, 2, 0.5), seed=9),
    )
    list(stream(llama.edge(), [[4] * 7] * 4, GenerationSettings(max_new_tokens=9)))
    assert programs() == (1, 1)
    # A longer prompt is a new prefill, more rows are new programs.
    generate(llama.edge(), [[4] * 17] * 4, GenerationSettings(max_new_tokens=5))
    assert programs() == (2, 2)
    generate(llama.edge(), [[4] * 3] * 5, GenerationSettings(max_new_tokens=5))
    assert programs() == (3, 3)
    # Any mixture of prompts over four rows is one program.
    for prompts in (2, 4):
        generate(
            llama.edge(make_gates(llama.decoder.config, prompts)), [[4] * 3] * 4, GenerationSettings(max_new_tokens=5)
        )
    assert programs() == (4, 4)


def test_the_cache_is_updated_in_place(llama):
    later, drawing, state = decode._start(llama.edge(), [[1, 2, 3]], GenerationSettings(8))
    after = decode._decode(later, drawing, state, np.int32(4))
    assert state.cache.k_LBSGH.is_deleted()
    assert int(after.step) == 4


def test_rematerialization_and_unrolling_change_nothing(llama):
    trained = llama.decoder.clone(remat="full", unroll=2)
    found = generate(EdgeModel(trained, llama.params), PROMPTS, GenerationSettings(max_new_tokens=4))
    for got, want in zip(found, generate(llama.edge(), PROMPTS, GenerationSettings(max_new_tokens=4)), strict=True):
        assert (got.ids, got.finish) == (want.ids, want.finish)
        np.testing.assert_allclose(got.logprobs, want.logprobs, **SAME)


def test_no_prompts_give_nothing(llama):
    assert generate(llama.edge(), [], GenerationSettings(max_new_tokens=4)) == []
    assert list(stream(llama.edge(), [], GenerationSettings(max_new_tokens=4))) == []


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_arrays_are_prompts_too(llama, array):
    prompts = [[5, 6, 7], [8, 9, 10]]
    want = generate(llama.edge(), prompts, GenerationSettings(max_new_tokens=4))
    assert generate(llama.edge(), array(prompts), GenerationSettings(max_new_tokens=4)) == want
    assert generate(llama.edge(), [array(prompt) for prompt in prompts], GenerationSettings(max_new_tokens=4)) == want


@pytest.mark.parametrize("function", [generate, stream])
def test_errors_name_the_remedy(llama, function):
    with raises(DataError, "prompts.1", "prompt 1", code="empty"):
        function(llama.edge(), [[1], []], GenerationSettings(max_new_tokens=4))
    with raises(DataError, "tokens", 65, 64, "prompt 0"):
        function(llama.edge(), [[1] * 60], GenerationSettings(max_new_tokens=5))
    with raises(DataError, "prompts.0", 67, "0 to 66", code="unknown id"):
        function(llama.edge(), [[1, 67]], GenerationSettings(max_new_tokens=4))
    with raises(DataError, "max_new_tokens", 0, code="range"):
        function(llama.edge(), [[1]], GenerationSettings(max_new_tokens=0))
    with raises(ConfigError, "top_p", 2.0):
        function(llama.edge(), [[1]], GenerationSettings(max_new_tokens=1, sampling=Sampling(1.0, 0, 2.0)))
    with raises(DataError, "rows", "3 rows", "2 prompts"):
        function(llama.edge(make_gates(llama.decoder.config, 2)), [[1]] * 3, GenerationSettings(max_new_tokens=1))


def test_a_prompt_may_fill_the_model(llama):
    prompt = list(range(60))
    got = generate(llama.edge(), [prompt], GenerationSettings(max_new_tokens=4))[0]
    assert got.ids == plain_greedy(llama, prompt, 4)[0]


def test_learned_positions_reach_the_end_of_their_table():
    opt = make_model(dataclasses.replace(CONFIGS["opt"], max_positions=20))
    prompt = list(range(15))
    assert (
        generate(opt.edge(), [prompt], GenerationSettings(max_new_tokens=5))[0].ids == plain_greedy(opt, prompt, 5)[0]
    )
