"""Multiple-choice figures against values computed by hand and by plain forward passes."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from helpers import color_rows, experiment, logits, raises, trained, write_rows

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import EvalConfig
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import CheckpointError, DataError, OutputError
from lora_gen_jax.evaluation import request_runner, run
from lora_gen_jax.evaluation.choices import metrics
from lora_gen_jax.evaluation.means import scores, summary
from lora_gen_jax.evaluation.run import evaluate
from lora_gen_jax.evaluation.systems import make_systems
from lora_gen_jax.evaluation.task import System, evaluate_task, task_prompt
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.methods import lora_gen
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import load_pair
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training.checkpoint import load_checkpoint

QUICK = EvalConfig(shots=2, batch_tokens=64)


@pytest.fixture(scope="module")
def pair():
    return load_pair(trained())


@pytest.fixture(autouse=True)
def _no_latency(monkeypatch):
    """Latency repeats every request; one repetition is enough here."""
    monkeypatch.setattr("lora_gen_jax.evaluation.choices.LATENCY_REPEATS", 1)
    monkeypatch.setattr("lora_gen_jax.evaluation.choices.LATENCY_DOCUMENTS", 1)


def choice(i, query, options, gold, **fields):
    lengths = tuple(len(o.strip()) for o in options)
    return Example(f"d{i}", query, options[gold], tuple(options), gold, option_lengths=lengths, **fields)


DOCUMENTS = [
    choice(0, "what kind is the moon ?", (" red", " green tree", " blue"), 1),
    choice(1, "say the", (" cat dog bird", " fish"), 1),
    choice(2, "two three", (" four five", " apple", " pear stone", " water"), 0),
    choice(3, "hot is not", (" cold", " big"), 0),
]
TRAIN = [Example(f"t{i}", f"what is {w} ?", f" {w}") for i, w in enumerate(("red", "one", "yes"))]


def make_task(documents, description="say one"):
    descriptions = (description,) if description else ()
    return Task("mine", descriptions, TRAIN, documents, source="x")


def plain_logprob(edge, params, context, continuation):
    """log p(continuation | context), each token by its own softmax in float64."""
    ids, more = edge.encoder.pair(context, continuation)
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(ids) + len(more)] = ids + more
    rows = np.asarray(logits(edge.decoder, params, tokens), np.float64)[0]
    total = 0.0
    for i, token in enumerate(more):
        row = rows[len(ids) + i - 1]
        total += row[token] - row.max() - np.log(np.sum(np.exp(row - row.max())))
    return total


def plain_figures(edge, params, documents, prefix=""):
    right, normed = [], []
    for d in documents:
        if d.contexts:
            values = [plain_logprob(edge, params, prefix + c, d.response) for c in d.contexts]
        else:
            values = [plain_logprob(edge, params, prefix + d.query, o) for o in d.options]
        right.append(values.index(max(values)) == d.gold)
        per_character = [v / n for v, n in zip(values, d.option_lengths, strict=True)]
        normed.append(per_character.index(max(per_character)) == d.gold)
    n, acc = len(right), sum(right) / len(right)
    return acc, sum(normed) / n, math.sqrt(acc * (1 - acc) / (n - 1))


def specialized_system(config, pair, task):
    checkpoints = {"lora_gen": load_checkpoint(config.directory)}
    return make_systems(config, ["lora_gen"], pair, checkpoints, [task])["lora_gen"]


def test_figures_are_those_of_plain_forward_passes(pair):
    edge, task = pair.edge, make_task(DOCUMENTS)
    got = evaluate_task(edge, task, System(lambda task: edge.plain), QUICK)
    acc, norm, stderr = plain_figures(edge, edge.params, DOCUMENTS)
    assert (got["acc"], got["acc_norm"], got["n"]) == (acc, norm, 4)
    assert got["stderr"] == pytest.approx(stderr)
    assert got["latency_ms"] > 0
    counts = [len(edge.encoder.pair(d.query, d.options[0])[0]) for d in DOCUMENTS]
    assert got["context_tokens"] == pytest.approx(np.mean(counts), abs=0.05)


def test_in_context_learning_reads_description_and_shots_before_every_query(pair):
    edge, task = pair.edge, make_task(DOCUMENTS)
    got = evaluate_task(edge, task, System(lambda task: edge.plain, reads_prompt=True), QUICK)
    prefix = task_prompt(task, QUICK).text + "\n\n"
    assert prefix.startswith("say one\n\nwhat is ")
    assert prefix.count("what is") == 2
    acc, norm, _ = plain_figures(edge, edge.params, DOCUMENTS, prefix)
    assert (got["acc"], got["acc_norm"]) == (acc, norm)
    base = evaluate_task(edge, task, System(lambda task: edge.plain), QUICK)
    assert got["context_tokens"] == pytest.approx(base["context_tokens"] + len(edge.encoder.text(prefix)), abs=0.11)


def test_options_in_the_context_are_scored_by_what_follows_them(pair):
    documents = [
        Example("w0", "the cat", " is small", (" is small",) * 2, 0, ("the cat", "the stone"), (7, 9)),
        Example("w1", "one star", " was big", (" was big",) * 2, 1, ("one dog", "one star"), (7, 8)),
    ]
    edge = pair.edge
    got = evaluate_task(edge, make_task(documents), System(lambda task: edge.plain), QUICK)
    acc, _, stderr = plain_figures(edge, edge.params, documents)
    assert got["acc"] == acc
    assert got["stderr"] == pytest.approx(stderr)
    assert got["n"] == 2


def test_without_shots_and_description_in_context_learning_is_the_base(pair):
    edge, task, settings = pair.edge, make_task(DOCUMENTS, ""), dataclasses.replace(QUICK, shots=0)
    assert task_prompt(task, settings) is None
    plain = System(lambda task: edge.plain)
    systems = (plain, dataclasses.replace(plain, reads_prompt=True))
    base, icl = (evaluate_task(edge, task, system, settings) for system in systems)
    for name in ("acc", "acc_norm", "stderr", "n", "context_tokens"):
        assert base[name] == icl[name]


def test_the_specialized_model_is_scored_without_the_prompt(pair):
    """Each task with the weights merged from its own system prompt, against plain passes of the query alone."""
    config = trained()
    loaded = load_checkpoint(config.directory)
    tasks = list(load_tasks(("warm", "count"), files=config.data.files).values())
    system = make_systems(config, ["lora_gen"], pair, {"lora_gen": loaded}, tasks)["lora_gen"]
    for task in tasks:
        got = evaluate_task(pair.edge, task, system, config.eval)
        ids = pair.cloud.encoder.prompt(task_prompt(task, config.eval).text)
        made = specialize(make_generator(config, pair), loaded.variables, pair.cloud.params, [ids])
        merged = merge(pair.edge.params, made.adapter.select(0))
        acc, norm, _ = plain_figures(pair.edge, merged, task.test)
        assert (got["acc"], got["acc_norm"], got["n"]) == (acc, norm, 2)


def test_metrics_by_hand():
    documents = [choice(i, "q", (" aa", " b", " cccc"), gold) for i, gold in enumerate((0, 1, 2, 2))]
    # Per character: (-2, -3.5, -1.5), (-2, -1, -4), (-1, -9, -1.5), (-3, -6, -1).
    logprobs = [(-4.0, -3.5, -6.0), (-4.0, -1.0, -16.0), (-2.0, -9.0, -6.0), (-6.0, -6.0, -4.0)]
    got = metrics(documents, logprobs)
    assert (got["acc"], got["acc_norm"], got["n"]) == (0.5, 0.5, 4)
    # Two of four right: √(0.25 / 3).
    assert got["stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert metrics(documents[:1], logprobs[:1])["stderr"] == 0.0


def test_ave_and_har_by_hand():
    tasks = {name: {"acc": acc} for name, acc in (("a", 0.5), ("b", 0.25), ("c", 1.0))}
    got = summary(tasks, {"a": True, "b": True, "c": False})
    assert got["ave"] == pytest.approx(1.75 / 3)
    assert got["har"] == pytest.approx(3 / (2 + 4 + 1))
    assert (got["ave_seen"], got["ave_unseen"]) == (0.375, 1.0)
    assert got["har_seen"] == pytest.approx(2 / (2 + 4))
    assert got["har_unseen"] == 1.0
    alone = summary({"a": {"acc": 0.0}, "b": {"acc": 0.5}}, {"a": True, "b": None})
    assert alone == {
        "ave": 0.25, "har": 0.0, "ave_seen": 0.0, "har_seen": 0.0, "ave_unseen": None, "har_unseen": None
    }  # fmt: skip


def test_scores_by_source_with_intervals_over_tasks():
    words = {f"w{i}": {"acc": acc} for i, acc in enumerate((0.0, 0.5, 1.0, 0.5))}
    tasks = words | {"long": {"acc": 0.0, "rouge_l": 0.25}}
    got = scores(tasks, {**dict.fromkeys(words, "words"), "long": "texts"})
    assert got["groups"]["texts"] == {"score": 0.25, "interval": None, "tasks": 1}
    assert got["groups"]["words"]["score"] == 0.5
    assert (got["mean"]["score"], got["mean"]["tasks"]) == (0.45, 5)
    # Of four values with mean 1/2 and variance 1/8 a resampled mean has standard deviation √(1/32); the mean of four
    # draws moves in steps of 1/8, and a 95 % interval of it lies two deviations around, within a step.
    low, high = got["groups"]["words"]["interval"]
    assert low == pytest.approx(0.5 - 1.96 / 32**0.5, abs=1 / 8)
    assert high == pytest.approx(0.5 + 1.96 / 32**0.5, abs=1 / 8)
    assert got == scores(tasks, {**dict.fromkeys(words, "words"), "long": "texts"})


def test_evaluate_writes_the_layout_and_the_specialized_model_has_learnt_its_tasks(tmp_path):
    settings = dataclasses.replace(trained().eval, batch_tokens=64)
    config = dataclasses.replace(trained(), eval=settings, workdir=tmp_path / "run")
    results = evaluate(config, trained().directory, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gates.json", "results.json"]
    assert not (tmp_path / "run").exists()
    gates = json.loads((tmp_path / "out" / "gates.json").read_text())["tasks"]
    assert list(gates) == ["warm", "count"]
    assert np.shape(gates["warm"])[1] == 4
    np.testing.assert_allclose(np.sum(gates["warm"], axis=-1), 1.0, atol=1e-5)
    assert {"config", "versions", "machine", "methods"} <= set(results)
    assert list(results["methods"]) == ["base", "icl", "lora_gen"]
    for method in results["methods"].values():
        means = {f"{mean}{end}" for mean in ("ave", "har") for end in ("", "_seen", "_unseen")}
        assert set(method) == {"tasks", "prompted", "mean", "groups"} | means
        assert method["mean"]["score"] == method["groups"]["rows"]["score"] == method["ave"]
        assert list(method["tasks"]) == ["warm", "count"]
        for task in method["tasks"].values():
            assert set(task) == {"acc", "acc_norm", "stderr", "n", "context_tokens", "latency_ms"}
        accuracies = [task["acc"] for task in method["tasks"].values()]
        assert method["ave"] == pytest.approx(np.mean(accuracies))
        assert method["ave_seen"] == method["ave"]
        assert method["ave_unseen"] is method["har_unseen"] is None
    # The same weights answer either task, each after its own prompt was read once.
    assert results["methods"]["lora_gen"]["ave"] == 1.0
    base, icl, ours = (results["methods"][m]["tasks"]["warm"]["context_tokens"] for m in ("base", "icl", "lora_gen"))
    assert base == ours < icl


def test_an_existing_output_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "mine").write_text("x")
    with raises(OutputError, "--out", tmp_path, code="exists"):
        evaluate(dataclasses.replace(trained(), edge=None, cloud=None), None, tmp_path)


def test_a_run_without_a_checkpoint_can_be_scored_by_the_methods_that_need_none(tmp_path):
    config = dataclasses.replace(trained(), workdir=tmp_path / "nothing")
    with raises(CheckpointError, "--checkpoint", tmp_path / "nothing", code="none"):
        evaluate(config, None, tmp_path / "out")
    settings = dataclasses.replace(config.eval, methods=("base",), tasks=("warm",), batch_tokens=64)
    assert list(evaluate(dataclasses.replace(config, eval=settings), None, tmp_path / "out")["methods"]) == ["base"]
    assert not config.directory.exists()


def test_settings_can_be_chosen_on_validation_rows(tmp_path):
    config = trained()
    tasks = load_tasks((), files=config.data.files)
    settings = dataclasses.replace(config.eval, tasks=("warm",), split="validation")
    (task,) = run.evaluated_tasks(dataclasses.replace(config, eval=settings))
    assert [d.id for d in task.test] == [d.id for d in tasks["warm"].validation]
    # Neither split becomes a shot.
    assert task.held_out_keys == tasks["warm"].held_out_keys
    rows = [row for row in color_rows() if row["split"] != "validation"]
    data = dataclasses.replace(config.data, files=(write_rows(tmp_path / "rows.jsonl", rows),))
    with raises(DataError, "eval.split", "task warm", "validation", code="empty"):
        run.evaluated_tasks(dataclasses.replace(config, eval=settings, data=data))


@pytest.mark.parametrize("case", ["no test", "mixed"])
def test_a_task_that_cannot_be_scored_is_refused_before_anything_is_scored(tmp_path, monkeypatch, case):
    rows = [{k: v for k, v in row.items() if k not in ("options", "gold")} for row in color_rows()]
    rows = [row for row in rows if row["task"] == "count" and (case == "mixed" or row["split"] != "test")]
    if case == "mixed":
        rows[-1] |= {"options": [rows[-1]["output"], "four"], "gold": 0}
    rows += [row for row in color_rows() if row["task"] == "warm"]
    config = experiment(trained().directory.parent, tmp_path / "run")
    files = (write_rows(tmp_path / "rows.jsonl", rows),)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, files=files))
    monkeypatch.setattr(run, "evaluate_task", lambda *args: pytest.fail("scored before all tasks were checked"))
    wrong = {"no test": ("eval.split", "task count", "test documents"), "mixed": ("rows-9", "task count", "rows-9")}
    with raises(DataError, wrong[case][0], *wrong[case][1:]):
        evaluate(config, trained().directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_models_is_refused(tmp_path, pair):
    config = trained()
    foreign = {"cloud": "0" * 16, "edge": "1" * 16}
    loaded = dataclasses.replace(load_checkpoint(config.directory), fingerprints=foreign)
    with raises(CheckpointError, "cloud.source", "0" * 16):
        make_systems(config, ["lora_gen"], pair, {"lora_gen": loaded}, [])


def test_a_prompt_longer_than_the_limit_is_refused(pair):
    config = dataclasses.replace(trained(), eval=dataclasses.replace(trained().eval, prompt_limit=5))
    task = load_tasks(("warm",), files=config.data.files)["warm"]
    system = specialized_system(config, pair, task)
    with raises(DataError, "prompts.0", 5):
        evaluate_task(pair.edge, task, system, config.eval)


def test_scoring_leaves_the_base_weights_alone(pair):
    before = jax.tree.map(lambda x: np.array(x, copy=True), pair.edge.params)
    config = trained()
    task = load_tasks(("warm",), files=config.data.files)["warm"]
    system = specialized_system(config, pair, task)
    evaluate_task(pair.edge, task, system, dataclasses.replace(config.eval, limit=1))
    jax.tree.map(np.testing.assert_array_equal, pair.edge.params, before)


def counted(monkeypatch, name, most=None):
    """Calls of a function of `request_runner` are noted; it fails when it is called more than `most` times."""
    real, calls = getattr(request_runner, name), []

    def call(*args, **kwargs):
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(args[1])
        return real(*args, **kwargs)

    monkeypatch.setattr(request_runner, name, call)
    return calls


def without_latency(results):
    methods = json.loads(json.dumps(results["methods"]))
    for method in methods.values():
        for task in method["tasks"].values():
            del task["latency_ms"]
    return methods


@pytest.mark.parametrize("kind", ["options", "free form"])
def test_an_evaluation_that_was_stopped_finishes_alike_and_repeats_nothing(tmp_path, monkeypatch, kind):
    settings = dataclasses.replace(trained().eval, batch_tokens=16)
    config, name = dataclasses.replace(trained(), eval=settings, workdir=tmp_path / "run"), "score"
    if kind == "free form":
        name = "generate"
        rows = [{k: v for k, v in row.items() if k not in ("options", "gold")} for row in color_rows()]
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, files=(write_rows(tmp_path / "rows.jsonl", rows),))
        )
    with monkeypatch.context() as patch:
        all_calls = counted(patch, name)
        whole = evaluate(config, trained().directory, tmp_path / "whole")
    with monkeypatch.context() as patch:
        done = counted(patch, name, 2)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, trained().directory, tmp_path / "out")
    # Another evaluation in the same place leaves the first one's results alone.
    other = dataclasses.replace(config, eval=dataclasses.replace(settings, limit=1, methods=("base",)))
    evaluate(other, None, tmp_path / "other")
    (journal,) = (tmp_path / "run" / ".unfinished").iterdir()
    with monkeypatch.context() as patch:
        calls = counted(patch, name, 1)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, trained().directory, tmp_path / "out")
        done += calls
    with monkeypatch.context() as patch:
        calls = counted(patch, name)
        made = patch_counter(patch, lora_gen, "specialize")
        again = evaluate(config, trained().directory, tmp_path / "out")
    assert done + calls == all_calls
    assert without_latency(again) == without_latency(whole)
    assert not journal.parent.exists()
    # Once for the gates of each task; the weights of a finished task are not made again.
    assert len(made) <= 2 + 2


def patch_counter(monkeypatch, module, name):
    """Notes every call of a function."""
    real, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.append(args), real(*args, **kwargs))[1])
    return calls


def test_a_trained_generator_meets_models_on_several_devices(tmp_path, monkeypatch):
    """What a checkpoint holds must not be tied to one device."""
    settings = dataclasses.replace(trained().eval, batch_tokens=64, tasks=("warm",), methods=("lora_gen",))
    config = dataclasses.replace(trained(), eval=settings, workdir=tmp_path / "run")
    one = evaluate(config, trained().directory, tmp_path / "one")
    monkeypatch.setattr(run, "evaluation_mesh", lambda fsdp: make_mesh(fsdp=fsdp))
    several = evaluate(config, trained().directory, tmp_path / "several")
    assert without_latency(several) == without_latency(one)


def test_several_numbers_of_shots_are_scored_at_once(tmp_path):
    settings = dataclasses.replace(trained().eval, batch_tokens=64, methods=("base", "icl"), tasks=("warm",))
    results = evaluate(dataclasses.replace(trained(), eval=settings), None, tmp_path / "out", [0, 2])
    assert list(results["by_shots"]) == ["0", "2"]
    assert results["by_shots"]["2"] == results["methods"]
    assert results["config"]["eval"]["shots"] == 2
    tokens = [results["by_shots"][k]["icl"]["tasks"]["warm"]["context_tokens"] for k in ("0", "2")]
    assert tokens[0] < tokens[1]
    one = evaluate(dataclasses.replace(trained(), eval=settings), None, tmp_path / "one", [2])
    assert "by_shots" not in one
    assert without_latency(one) == without_latency(results)
