"""The model `lora_gen` of lm-evaluation-harness against lm-eval's own `hf` backend on the same files."""

import jax
import numpy as np
import pytest
from helpers import WORDS, raises, write_model
from lm_eval.api.registry import get_model
from lm_eval_requests import agree, instances, loglikelihood_arguments, words

from lora_gen_jax.errors import ConfigError, DataError, ModelError
from lora_gen_jax.evaluation import request_runner
from lora_gen_jax.evaluation.lm_eval_model import LoraGenLM

TURNS = "{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}say : {% endif %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    # No rows beyond the tokenizer's ids, so that every generated id has a text.
    return write_model(tmp_path_factory.mktemp("lm_eval") / "model", seed=7, vocab_size=7 + len(WORDS))


@pytest.fixture(scope="module")
def hf(directory):
    """lm-eval's own backend, in fp32 on the CPU.

    Without its cache of logits: of two requests with the same ids, split into context and continuation at another
    place, it gives the shorter continuation the log-likelihood at the wrong position.
    """
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 1, "logits_cache": False}
    return get_model("hf")(pretrained=str(directory), **settings)


@pytest.fixture
def ours(directory):
    return LoraGenLM(model=str(directory), dtype="float32", batch_tokens=64)


def test_loglikelihoods_are_those_of_lm_evals_own_backend(hf, ours, monkeypatch):
    prefixes = []
    real = request_runner.encode_prefix
    monkeypatch.setattr(request_runner, "encode_prefix", lambda *a: prefixes.append(len(a[1])) or real(*a))
    pairs = loglikelihood_arguments()
    # Greedy continuations, so that both answers occur.
    pairs += [
        ("red green", " " + hf.generate_until(instances("generate_until", [("red green", {"max_gen_toks": 3})]))[0])
    ]
    requests = instances("loglikelihood", pairs)
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    agree(ours.loglikelihood(requests, disable_tqdm=True), expected)
    assert {flag for _, flag in expected} == {True, False}
    # Both few-shot blocks, and the full stop behind them, are read once.
    assert sorted(prefixes) == [41, 61]


def test_rolling_loglikelihoods_are_those_of_lm_evals_own_backend(hf, ours):
    rng = np.random.default_rng(6)
    requests = instances("loglikelihood_rolling", [(words(rng, n),) for n in (1, 7, 160, 161, 400)] + [("",)])
    expected = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    got = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    # As `agree`, of up to 400 tokens; lm-eval adds up in float32, the windows, too: a dozen roundings by 2^-24.
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-4)


def test_a_lower_max_length_cuts_contexts_and_windows_alike(hf, directory, monkeypatch):
    monkeypatch.setattr(hf, "_max_length", 20)
    ours = LoraGenLM(model=str(directory), dtype="float32", batch_tokens=64, max_length=20)
    rng = np.random.default_rng(7)
    pairs = instances("loglikelihood", [(words(rng, n), " " + words(rng, 4)) for n in (3, 16, 17, 18, 40)])
    agree(ours.loglikelihood(pairs, disable_tqdm=True), hf.loglikelihood(pairs, disable_tqdm=True))
    texts = instances("loglikelihood_rolling", [(words(rng, 50),)])
    expected = hf.loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(texts, disable_tqdm=True), expected, rtol=0, atol=1e-4)
    wanted = instances("generate_until", [(words(rng, 30), {"until": [], "max_gen_toks": 5})])
    assert ours.generate_until(wanted, disable_tqdm=True) == hf.generate_until(wanted, disable_tqdm=True)


def test_greedy_texts_are_those_of_lm_evals_own_backend(hf, ours):
    rng = np.random.default_rng(8)
    block = words(rng, 30)
    contexts = [f"{block} {words(rng, n)}" for n in (1, 3, 3, 5)] + [words(rng, 200), "<s> cat"]
    free = {"until": [], "max_gen_toks": 20}
    whole = hf.generate_until(instances("generate_until", [(c, free) for c in contexts]), disable_tqdm=True)
    arguments = [(c, free) for c in contexts]
    for context, text in list(zip(contexts, whole, strict=True))[3:]:
        # Words that do come up, at the start, in the middle, at the end, and two at once.
        parts = text.split()
        for until in ([parts[0]], [" " + parts[len(parts) // 2]], [f"{parts[-2]} {parts[-1]}"], [parts[9], parts[4]]):
            arguments.append((context, {"until": until, "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}))
    arguments += [(contexts[0], {"until": "sun", "max_new_tokens": 9}), (contexts[0], free)]
    requests = instances("generate_until", arguments)
    got = ours.generate_until(requests, disable_tqdm=True)
    assert got == hf.generate_until(requests, disable_tqdm=True)
    assert len(set(got)) > len(contexts)


def test_an_end_token_ends_the_text(hf, ours):
    """Every continuation that the model would give, cut where its own files say that a text ends."""
    context = "red green"
    free = instances("generate_until", [(context, {"until": [], "max_gen_toks": 12})])
    text = ours.generate_until(free, disable_tqdm=True)[0]
    third = text.split()[2]
    object.__setattr__(ours.subject, "end_ids", (ours.tok_encode(third)[0],))
    ours.runner.cache.results.clear()
    shorter = ours.generate_until(free, disable_tqdm=True)[0]
    assert shorter.split() == text.split()[: text.split().index(third)]


def test_sampled_texts_are_drawn_once_each_and_again_the_same(directory, tmp_path):
    arguments = [("red green", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5})] * 4
    requests = instances("generate_until", arguments)
    made = [
        LoraGenLM(model=str(directory), dtype="float32", batch_tokens=64, seed=seed).generate_until(requests, True)
        for seed in (0, 0, 1)
    ]
    assert len(set(made[0])) == 4
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_chats_are_those_of_lm_evals_own_backend(hf, ours, monkeypatch):
    turns = [{"role": role, "content": f"{role} cat"} for role in ("system", "user", "assistant")]
    with raises(ModelError, "chat_template", "--apply_chat_template"):
        ours.apply_chat_template(turns)
    for template in (TEMPLATE, STRICT):
        for tokenizer in (hf.tokenizer, ours.tokenizer):
            monkeypatch.setattr(tokenizer, "chat_template", template)
        for chat, opened in ((turns[:2], True), (turns, False)):
            assert ours.apply_chat_template(chat, opened) == hf.apply_chat_template(chat, opened)
        assert ours.chat_template(True) == hf.chat_template(True) == template
    assert ours.tokenizer_name == hf.tokenizer_name


@pytest.mark.parametrize(
    ("arguments", "field", "code", "facts"),
    [
        ({}, "model", None, ("--model_args",)),
        ({"modle": "x"}, "modle", "unknown", ("'modle'", "model")),
        ({"model": "x", "batch_size": "many"}, "batch_size", None, ("many", "auto")),
        ({"model": "x", "batch_tokens": 0}, "batch_tokens", None, (0,)),
        ({"model": "x", "dtype": "float16"}, "dtype", None, ("float16", "bfloat16")),
        ({"specialization": "x", "prompt": "y"}, "prompt", "conflict", ("specialization", "prompt")),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, field, code, facts):
    with raises(ConfigError, field, *facts, code=code):
        LoraGenLM(**arguments)


def test_requests_that_cannot_work_are_refused(ours, directory):
    with raises(DataError, "context", code="empty"):
        ours.loglikelihood(instances("loglikelihood", [(" ", "red")]), disable_tqdm=True)
    with raises(DataError, "continuation", 161, 160, code="too long"):
        ours.loglikelihood(instances("loglikelihood", [("red", " cat" * 161)]), disable_tqdm=True)
    for arguments, error, field, fact in (
        ({"until": [], "num_beams": 4}, ConfigError, "generation_kwargs", "num_beams"),
        ({"until": [], "do_sample": True}, ConfigError, "temperature", "do_sample"),
        ({"until": [], "max_gen_toks": 160}, DataError, "max_gen_toks", 160),
    ):
        with raises(error, field, fact):
            ours.generate_until(instances("generate_until", [("red", arguments)]), disable_tqdm=True)
    with raises(ConfigError, "max_length", 161, 160):
        LoraGenLM(model=str(directory), max_length=161)


def test_batch_sizes_become_tokens(directory):
    for size, tokens in (("auto", 8192), ("auto:4", 8192), (3, 1536), ("2", 1024)):
        assert LoraGenLM(model=str(directory), batch_size=size).settings.tokens_at_once == tokens


def test_the_base_weights_are_those_on_disk(ours, directory):
    """Nothing that the backend does changes what it was given."""
    before = jax.tree.map(lambda x: np.array(x, copy=True), ours.subject.model.params)
    ours.loglikelihood(instances("loglikelihood", [("red", " cat")]), disable_tqdm=True)
    jax.tree.map(np.testing.assert_array_equal, ours.subject.model.params, before)
