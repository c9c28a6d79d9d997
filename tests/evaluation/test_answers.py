"""Free-form answers: where they end, what counts as exact, and that a batch changes nothing."""

import dataclasses

import numpy as np
import pytest
from helpers import raises

from lora_gen_jax.config import EvalConfig, ModelConfig
from lora_gen_jax.data.pocket.suite import find
from lora_gen_jax.data.pocket.world import ATTRIBUTES
from lora_gen_jax.data.prompts import evaluation_shots
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation import answers, request_runner
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.request_runner import Runner
from lora_gen_jax.evaluation.subject import EvaluatedModel
from lora_gen_jax.evaluation.task import System, check_lengths, evaluate_task, exact_match
from lora_gen_jax.inference.decode import Generation
from lora_gen_jax.models import Pair, load_model

SETTINGS = EvalConfig(shots=5)


@pytest.fixture(scope="module")
def edge():
    return load_model(ModelConfig("pocket-edge"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(answers, "LATENCY_REPEATS", 1)
    monkeypatch.setattr(answers, "LATENCY_DOCUMENTS", 1)


def runner(edge):
    return Runner(EvaluatedModel("", edge), RequestCache(None, ""), 8192)


def exact(edge, documents, read):
    made = answers.answered(runner(edge), documents, read)
    return [text == document.response.strip() for text, document in zip(made, documents, strict=True)]


def test_a_model_that_reads_shots_stops_where_the_next_one_would_start(edge):
    task = find("pocket/sound/quotes")[0]
    shots = evaluation_shots(task, 5, 0)
    read = answers.contexts(edge, task.test, task.descriptions[0], shots)
    assert edge.encoder.decode(read[0]).endswith(task.test[0].query)
    assert all(exact(edge, task.test, read))


def test_another_answer_is_no_match(edge):
    task = find("pocket/sound/quotes")[0]
    shots = evaluation_shots(task, 5, 0)
    read = answers.contexts(edge, task.test, task.descriptions[0], shots)
    wrong = [Example(e.id, e.query, e.response.replace('"', "'")) for e in task.test]
    assert not any(exact(edge, wrong, read))


def test_many_documents_are_answered_in_batches_and_in_order(edge, monkeypatch):
    things = sorted({thing for attribute in ATTRIBUTES for thing in attribute.values})[:21]
    documents = [Example(thing, f"{thing}:", f" {thing}") for thing in things]
    batches = []

    def echo(model, rows, settings):
        batches.append(len(rows))
        return [Generation(edge.encoder.text(" " + edge.encoder.decode(row)[:-1]), "stop", []) for row in rows]

    monkeypatch.setattr(request_runner, "generate", echo)
    read = answers.contexts(edge, documents, "", ())
    swapped = [*read[1:], read[0]]
    assert all(exact(edge, documents, read))
    assert sum(exact(edge, documents, swapped)) == 0
    # All at once, and what a second question about the same rows repeats.
    assert set(batches) == {32}


def test_what_is_cut_off():
    plain, lines, blank = (Example("a", "q:", text) for text in (" yes", " two\nlines", " a\n\nb"))
    assert [answers.break_of(d) for d in ([plain], [plain, lines], [lines, blank])] == ["\n", "\n\n", None]
    assert answers.trimmed(' "hoot"\ncow: "moo"', "\n") == '"hoot"'
    assert answers.trimmed("\ntwo\nlines\n\nrest", "\n\n") == "two\nlines"
    assert answers.trimmed(" a\n\nb ", None) == "a\n\nb"
    assert answers.trimmed("  ", "\n") == ""


def test_rouge_l_is_that_of_the_reference_implementation():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    gold = "Amanda baked cookies, and will bring Jerry some of them tomorrow."
    texts = (gold, "Jerry will bring Amanda COOKIES tomorrow!", "them of some", "no - match", "", "them them them")
    for text in texts:
        assert answers.rouge_l(text, gold) == pytest.approx(scorer.score(gold, text)["rougeL"].fmeasure)
    # It knows English letters alone.
    assert answers.rouge_l("Der Bär schläft", "der Bär wacht") == pytest.approx(2 / 3)


def test_long_answers_are_scored_by_rouge_l_beside_exact_match(edge):
    task = find("pocket/sound/quotes")[0]
    documents = [Example(e.id, e.query, f"{e.response} {'as everyone knows ' * 3}") for e in task.test[:3]]
    long = dataclasses.replace(task, test=documents)
    system = System(lambda task: edge.plain, reads_prompt=True)
    settings = dataclasses.replace(SETTINGS, latency=False)
    got = evaluate_task(edge, long, system, settings)
    assert got["acc"] == 0.0
    # One word of ten is answered.
    assert got["rouge_l"] == pytest.approx(2 / 11)
    assert "rouge_l" not in evaluate_task(edge, task, system, dataclasses.replace(settings, limit=3))


def test_the_line_break_ends_only_answers_that_have_none(edge):
    (line_break,) = edge.encoder.tokenizer("\n", add_special_tokens=False)["input_ids"]
    one = [Example("a", "q:", " yes")]
    assert line_break in answers.stops(edge, one)
    assert answers.stops(edge, [*one, Example("b", "q:", " two\nlines")]) == [edge.encoder.end]
    # Plain records: the line break stands between query and answer.
    assert answers.stops(edge, [Example("c", "question", "answer")]) == [edge.encoder.end]


def test_the_figures_of_a_task(edge):
    task = find("pocket/capital/brackets-dot")[0]
    base, icl = (
        evaluate_task(edge, task, System(lambda task: edge.plain, reads_prompt=reads), SETTINGS)
        for reads in (False, True)
    )
    assert base["acc"] == 0.0
    assert icl["acc"] == icl["acc_norm"] > 0.9
    assert icl["n"] == len(task.test)
    assert base["context_tokens"] == pytest.approx(
        np.mean([len(edge.encoder.text(e.query)) for e in task.test]), abs=0.1
    )
    assert icl["context_tokens"] > 10 * base["context_tokens"]
    assert base["latency_ms"] > 0


def test_standard_error_by_hand():
    assert exact_match([True, False, True, True]) == {
        "acc": 0.75,
        "acc_norm": 0.75,
        "stderr": pytest.approx((0.75 * 0.25 / 3) ** 0.5),
        "n": 4,
    }
    assert exact_match([True])["stderr"] == 0.0


@pytest.mark.parametrize("options", [(), (" a", " b")])
def test_chats_are_refused(edge, options):
    task = Task("talk", ("be kind",), (), [Example("a", "hello", " a", options, 0)], chat=True, source="x")
    with raises(DataError, "talk", "task talk"):
        evaluate_task(edge, task, System(lambda task: edge.plain), SETTINGS)


def test_a_document_that_leaves_just_enough_room_is_timed_too(edge):
    """Up to the next power of two of new tokens would not fit behind it."""
    document = Example("long", "sun " * 400, " " + "moon " * 30)
    (context,) = answers.contexts(edge, [document], "", ())
    room = edge.config.max_positions - answers.answer_limit(edge, [document])
    context = (context * 9)[:room]
    assert answers.answer_latency(edge, edge.plain, [document], [context]) > 0


@pytest.mark.parametrize("reads", [False, True])
def test_documents_and_prompts_that_do_not_fit_are_named_before_anything_is_scored(edge, reads):
    shots = tuple(Example(f"s{k}", f"{k} sun " + "warm " * 20, " sea") for k in range(30))
    long = Example("long", "sun " * edge.config.max_positions, " sea")
    task = Task(
        "mine", ("Say sea.",), shots, (Example("short", "moon", " sea"), *(() if reads else (long,))), source="mine"
    )
    systems = {"icl" if reads else "base": System(lambda task: edge.plain, reads)}
    pair = Pair(edge, edge)
    name, method = ("short", "icl") if reads else ("long", "base")
    with raises(DataError, name, "task mine", f"document {name}", f"method {method}", "edge tokens"):
        check_lengths(pair, systems, [task], EvalConfig(shots=30))
    with raises(DataError, "eval.prompt_limit", "task mine", "30 shots", "cloud tokens", 64):
        read = {"lora_gen": dataclasses.replace(systems.popitem()[1], cloud_reads=True)}
        check_lengths(pair, read, [task], EvalConfig(shots=30, prompt_limit=64))
