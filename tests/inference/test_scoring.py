"""Scores against one full forward pass per continuation, whatever shares a row, a batch or a prefix."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SAME, raises
from inference_models import CONFIGS, make_gates, make_model

from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.errors import DataError
from lora_gen_jax.inference import scoring
from lora_gen_jax.inference.edge_model import Prefix
from lora_gen_jax.inference.prefix import encode_prefix
from lora_gen_jax.inference.rows import Request, batches, pack, split_rows
from lora_gen_jax.inference.scoring import score

pytestmark = pytest.mark.float64
REQUESTS = [
    Request([5, 9, 60, 3, 22, 8, 41], [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]),
    Request([2], [[7], [8], [9, 9]]),
    Request([33, 7, 50, 12, 40, 41, 42, 43, 44, 45, 46], [[11, 12]]),
    Request([1, 1, 2, 3], [[30] * 9, [31, 5]]),
]


def plain_score(model, context, continuation, adapter=None):
    """Sum of log-probabilities and greediness of one continuation, by one full forward pass."""
    logits = model.logits([*context, *continuation], adapter)[len(context) - 1 : -1]
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return logprobs[np.arange(len(continuation)), continuation].sum(), (logits.argmax(1) == continuation).all()


def assert_scores(scores, model, requests, adapter=None, before=()):
    assert len(scores) == len(requests)
    for got, (context, continuations) in zip(scores, requests, strict=True):
        want = [plain_score(model, [*before, *context], c, adapter) for c in continuations]
        np.testing.assert_allclose(got.logprobs, [w[0] for w in want], **SAME)
        assert got.is_greedy == tuple(w[1] for w in want)


def test_one_row_per_request_equals_each_continuation_alone(model):
    assert_scores(score(model.edge(), REQUESTS, batch_tokens=128), model, REQUESTS)


@pytest.mark.parametrize("batch_tokens", [1, 16, 48, 1024])
def test_batching_changes_nothing(llama, batch_tokens):
    # One token at a time: every continuation goes alone.
    assert_scores(score(llama.edge(), REQUESTS, batch_tokens=batch_tokens), llama, REQUESTS)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_a_prefix_is_read_once_and_changes_nothing(family):
    model = make_model(CONFIGS[family])
    adapter = make_gates(model.decoder.config, prompts=1)
    shots = [7, 7, 12, 50, 31, 2, 18, 40, 3, 5, 5, 61, 20, 21, 22, 23, 24]
    prefix = encode_prefix(model.edge(adapter), shots)
    got = score(model.edge(adapter, prefix), REQUESTS, batch_tokens=64)
    assert_scores(got, model, REQUESTS, adapter, before=shots)
    whole = [Request(shots + list(r.context), r.continuations) for r in REQUESTS]
    for a, b in zip(got, score(model.edge(adapter), whole, batch_tokens=64), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, **SAME)


def test_greedy_continuations_are_recognized(llama):
    context = [5, 9, 60, 3]
    greedy = list(context)
    for _ in range(4):
        greedy.append(int(llama.logits(greedy)[-1].argmax()))
    right = greedy[4:]
    wrong_last = [*right[:3], (right[3] + 1) % 67]
    wrong_first = [(right[0] + 1) % 67, *right[1:]]
    got = score(llama.edge(), [Request(context, [right, wrong_last, wrong_first, right[:1]])], batch_tokens=64)[0]
    assert got.is_greedy == (True, False, False, True)


def test_logits_are_computed_in_chunks(llama, monkeypatch):
    whole = score(llama.edge(), REQUESTS, batch_tokens=64)
    # Chunks of 7 positions, which divide no bucket.
    monkeypatch.setattr(scoring, "LOGITS_IN_MEMORY", 7 * 67 + 3)
    jax.clear_caches()
    chunked = score(llama.edge(), REQUESTS, batch_tokens=64)
    jax.clear_caches()
    for a, b in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, **SAME)
        assert a.is_greedy == b.is_greedy


def test_more_single_tokens_than_positions(llama):
    requests = [Request([3, 4], [[i] for i in range(40)])]
    assert_scores(score(llama.edge(), requests, batch_tokens=16), llama, requests)


def test_a_long_request_loses_context_from_the_left(caplog):
    model = make_model(dataclasses.replace(CONFIGS["llama"], max_positions=12))
    rng = np.random.default_rng(0)
    context = rng.integers(0, 67, 20).tolist()
    requests = [Request(context, [[1, 2, 3], [4]]), Request([5, 6], [[7, 8]]), Request([9], [list(range(12))])]
    with caplog.at_level(logging.WARNING):
        got = score(model.edge(), requests, batch_tokens=64)
    assert "1 of 3 requests exceed the model's 12 positions" in caplog.text
    # lm-eval keeps the last 12 + 1 tokens of context and continuation together and reads all but the last.
    np.testing.assert_allclose(got[0].logprobs[0], plain_score(model, context[-10:], [1, 2, 3])[0], **SAME)
    np.testing.assert_allclose(got[0].logprobs[1], plain_score(model, context[-12:], [4])[0], **SAME)
    assert_scores(got[1:], model, requests[1:])
    # With a prefix, the prefix goes first.
    split = [Request(context[15:], [[1, 2, 3], [4]]), requests[1]]
    prefix = encode_prefix(model.edge(), context[:5])
    again = score(model.edge(prefix=prefix), split, batch_tokens=64)
    np.testing.assert_allclose(
        again[0].logprobs[0], plain_score(model, (context[:5] + context[15:])[-10:], [1, 2, 3])[0], **SAME
    )


def test_nothing_of_a_soft_prompt_is_cut():
    model = make_model(dataclasses.replace(CONFIGS["llama"], max_positions=12))
    decoder, params = model
    soft_1TD = jnp.asarray(np.random.default_rng(1).standard_normal((1, 4, 32)))
    positions = np.arange(4, dtype=np.int32)[None]
    cache = KVCache.empty(decoder.config, 1, 4, float)
    _, cache = decoder.apply({"params": params}, soft_1TD, positions, cache=cache, method="encode")
    context, continuation = list(range(20, 30)), [1, 2, 3]
    embedded = decoder.apply({"params": params}, jnp.array([[*context[-6:], 1, 2]]), method="embed")
    hidden, _ = decoder.apply(
        {"params": params},
        jnp.concatenate([soft_1TD, embedded], axis=1),
        np.arange(12, dtype=np.int32)[None],
        method="encode",
    )
    logprobs = jax.nn.log_softmax(decoder.apply({"params": params}, hidden, method="logits")[0, 9:], axis=-1)
    got = score(model.edge(prefix=Prefix(cache, length=4)), [Request(context, [continuation])], batch_tokens=64)
    np.testing.assert_allclose(got[0].logprobs[0], logprobs[np.arange(3), continuation].sum(), **SAME)


def test_one_compilation_per_bucket(llama):
    jax.clear_caches()
    rng = np.random.default_rng(0)

    def requests(count, low, high):
        lengths = rng.integers(low, high, count)
        return [Request(rng.integers(0, 67, n).tolist(), [[1, 2], [3]]) for n in lengths]

    score(llama.edge(), requests(16, 3, 15), batch_tokens=64)
    assert scoring._score_batch._cache_size() == 1
    score(llama.edge(), requests(40, 1, 15), batch_tokens=64)
    assert scoring._score_batch._cache_size() == 1
    score(llama.edge(), requests(4, 17, 30), batch_tokens=64)
    assert scoring._score_batch._cache_size() == 2


def test_progress_counts_continuations(llama):
    seen = []
    score(llama.edge(), REQUESTS, batch_tokens=32, progress=lambda *done: seen.append(done))
    assert seen[-1] == (9, 9)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_context_is_read_once_per_row():
    (row,) = split_rows(0, REQUESTS[0], 64)
    batch = pack([row], 0, 1)
    # 7 tokens of context, then 2 + 0 + 5 of the continuations, whose last tokens are only predicted.
    assert row.length == 14
    np.testing.assert_array_equal(batch.positions_BT[0], [*range(7), 7, 8, *range(7, 12), -1, -1])
    np.testing.assert_array_equal(batch.segments_BT[0], [0] * 7 + [1] * 2 + [3] * 5 + [0] * 2)
    np.testing.assert_array_equal(batch.source_M[: batch.used], [6, 7, 8, 6, 6, 9, 10, 11, 12, 13])
    np.testing.assert_array_equal(batch.target_M[: batch.used], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])


def test_batches_hold_what_fits():
    rows = [row for n in (40, 3, 100, 16, 17, 15) for row in split_rows(0, Request([1] * n, [[2]]), 200)]
    lengths = [[row.length for row in batch] for batch in batches(rows, 64)]
    assert lengths == [[100], [40], [17, 16], [15, 3]]


def test_errors_name_the_request(llama):
    def run(request, **options):
        score(llama.edge(**options), [REQUESTS[0], request], batch_tokens=64)

    with raises(DataError, "requests.1.context", "request 1", code="empty"):
        run(([], [[1]]))
    with raises(DataError, "requests.1.continuation", "request 1", code="empty"):
        run(([1], [[1], []]))
    with raises(DataError, "requests.1.continuation", "request 1", 65, 64, code="too long"):
        run(([1], [[1] * 65]))
    with raises(DataError, "requests.1.context", 67, code="unknown id"):
        run(([67], [[1]]))
    with raises(DataError, "requests.1.continuation", "-2", code="unknown id"):
        run(([1], [[-2]]))
    with raises(DataError, "adapter", "3 prompts"):
        run(([1], [[1]]), adapter=make_gates(llama.decoder.config, 3))


def test_prefix_errors(llama):
    with raises(DataError, "prefix", code="empty"):
        encode_prefix(llama.edge(), [])
    with raises(DataError, "prefix", 64, code="too long"):
        encode_prefix(llama.edge(), [1] * 64)
    with raises(DataError, "prefix", 99, code="unknown id"):
        encode_prefix(llama.edge(), [99])


def test_no_requests_and_no_continuations(llama):
    assert score(llama.edge(), [], batch_tokens=64) == []
    assert score(llama.edge(), [Request([1], [])], batch_tokens=64)[0].logprobs == ()
