"""Our task definitions in lm-eval: the texts are those of eval.py, the shots the same for all documents."""

import dataclasses
import json
import os

import pytest
from helpers import raises, trained
from lm_eval.api.samplers import SAMPLER_REGISTRY
from lm_eval.tasks import TaskManager

from lora_gen_jax.config import CompressorConfig
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.prompts import evaluation_shots, few_shot_context
from lora_gen_jax.data.reasoning import REASONING_TASKS
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.evaluation.harness import result_of, seen_of
from lora_gen_jax.evaluation.lm_eval_documents import TASKS, FixedShots, documents, split_contexts, use_fixed_shots

REAL = os.environ.get("LORA_GEN_DATA")


def arc_row(i):
    choices = [{"text": f"answer {i}{label}", "label": label} for label in "ABC"]
    return {"id": f"q{i}", "question": {"stem": f"Which is number {i}?", "choices": choices}, "answerKey": "ABC"[i % 3]}


def winogrande_row(i):
    sentence = f"The cat saw the dog {i} times and _ ran away."
    return {"qID": f"w{i}", "sentence": sentence, "option1": "the cat", "option2": "the dog", "answer": "12"[i % 2]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Files of two tasks in their original schemas, with rows of our own."""
    root = tmp_path_factory.mktemp("tasks")
    splits = {"train": range(30), "validation": range(30, 40), "test": range(40, 50)}
    for name, row in (("arc_easy", arc_row), ("arc_challenge", arc_row), ("winogrande", winogrande_row)):
        (root / name).mkdir()
        for split, numbers in splits.items():
            text = "".join(json.dumps(row(i + 100 * (name == "arc_challenge"))) + "\n" for i in numbers)
            (root / name / f"{split}.jsonl").write_text(text)
    return root


def agrees(root, names, limit):
    """Contexts and continuations of lm-eval's requests are those that eval.py scores."""
    for described in (False, True):
        metadata = {"data_dir": str(root), "descriptions": described, "model": "as lm-eval adds it"}
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
        found = manager.load([f"lora_gen_{name}" for name in names])["tasks"]
        for name in names:
            task, ours = found[f"lora_gen_{name}"], load_tasks([name], root)[name]
            for k in (0, 3):
                task.set_config("num_fewshot", k)
                task.build_all_requests(limit=limit)
                head, shots = ours.descriptions[0] if described else "", evaluation_shots(ours, k, 0)
                wanted = []
                for e in ours.test[:limit]:
                    queries = e.contexts or (e.query,) * len(e.options)
                    texts = [few_shot_context(head, shots, query) for query in queries]
                    wanted += zip(texts, e.options, strict=True)
                got = [request.args for request in task.instances]
                # Beyond these, lm-eval asks for continuations without their context, for a metric of its own.
                assert got[: len(wanted)] == wanted, name
                assert [request.doc["gold"] for request in task.instances[: len(wanted)]] == [
                    e.gold for e in ours.test[:limit] for _ in e.options
                ]


@pytest.mark.filterwarnings("ignore")
def test_texts_are_those_of_our_own_evaluation(directory):
    agrees(directory, ("arc_easy", "winogrande"), 5)


@pytest.mark.skipif(REAL is None, reason="LORA_GEN_DATA names no directory of task files")
@pytest.mark.filterwarnings("ignore")
def test_texts_of_the_real_tasks_are_those_of_our_own_evaluation():
    agrees(REAL, REASONING_TASKS, 4)


def test_another_seed_draws_other_shots(directory):
    first, second = (documents("arc_easy", str(directory), shots_seed=seed)["shots"]["id"] for seed in (0, 1))
    assert first != second
    assert len(set(first)) == len(first) > 20
    with raises(ConfigError, "shots_seed", "'x'"):
        documents("arc_easy", str(directory), shots_seed="x")
    with raises(DataError, "data.dir", directory / "nothing", code="missing"):
        documents("arc_easy", str(directory / "nothing"))


def test_the_prompt_is_what_contexts_begin_with():
    prompt = "say it\n\nQ: a\nA: b\n\nQ: c\nA: d"
    contexts = [f"{prompt}\n\nQ: {letter}\nA:" for letter in "efgh"]
    wanted = {context: (prompt, context[len(prompt) + 2 :]) for context in contexts} | {"": ("", "")}
    assert split_contexts(contexts) == wanted
    # A document that is itself among the shots has another prompt.
    other = "say it\n\nQ: c\nA: d\n\nQ: x\nA: y"
    found = split_contexts([*contexts, f"{other}\n\nQ: a\nA:"])
    assert found == wanted | {f"{other}\n\nQ: a\nA:": (other, "Q: a\nA:")}
    # A query may have blank lines of its own, and as many requests as it has options.
    passages = [f"say it\n\n{a} passage\n\nwhat?" for a in ("one", "two", "three")]
    found = split_contexts([passages[0]] * 5 + [passages[1]] * 4 + [passages[2], ""])
    assert found[passages[1]] == ("say it", "two passage\n\nwhat?")


def test_contexts_that_show_no_prompt():
    assert split_contexts(["Q: a\n\nQ: b", "Q: c\n\nQ: d"]) is None
    # A single document does not tell where its query begins.
    assert split_contexts(["an article\n\na question"] * 4) is None
    with raises(DataError, "contexts", 1, "'c'"):
        split_contexts(["say\n\na", "say\n\nb", "c"])


def test_fixed_shots_are_the_same_for_all_documents(monkeypatch):
    monkeypatch.setitem(SAMPLER_REGISTRY, "default", SAMPLER_REGISTRY["default"])
    rows = [{"x": i} for i in range(9)]
    use_fixed_shots()
    sampler = SAMPLER_REGISTRY["default"](rows, rnd=3)
    assert isinstance(sampler, FixedShots)
    shots = sampler.sample(3)
    assert len(shots) == 3
    assert all(sampler.sample(3, eval_doc=row) == shots for row in rows if row not in shots)
    for shot in shots:
        without = sampler.sample(3, eval_doc=shot)
        assert len(without) == 3
        assert shot not in without
        assert [one for one in shots if one != shot] == without[:2]
    others = [sampler.set_rnd(seed).sample(3) for seed in range(5)]
    assert len({str(one) for one in others}) > 1
    with raises(DataError, "--num_fewshot", 10):
        sampler.sample(10)


def test_a_document_that_stands_twice_among_the_shots_is_replaced():
    rows = [{"x": i // 2} for i in range(10)]
    sampler = FixedShots(rows, rnd=0)
    usual = sampler.sample(3)
    for row in rows:
        shots = sampler.sample(3, eval_doc=row)
        assert len(shots) == 3
        assert row not in shots
        kept = [one for one in usual if one != row]
        assert shots[: len(kept)] == kept
    assert len(sampler.sample(8, eval_doc=rows[0])) == 8
    with raises(DataError, "--num_fewshot", "10 documents", 9):
        sampler.sample(9, eval_doc=rows[0])


@pytest.fixture
def registry(monkeypatch):
    """Models that read prompts from tasks change how lm-eval draws shots; not for the tests that follow."""
    monkeypatch.setitem(SAMPLER_REGISTRY, "default", SAMPLER_REGISTRY["default"])


@pytest.mark.filterwarnings("ignore")
def test_each_task_is_answered_by_the_model_specialized_for_its_own_prompt(tmp_path, registry, monkeypatch):
    """Scores of a model that reads prompts from the tasks, against those of a model given that prompt."""
    from lm_eval.api.instance import Instance
    from lm_eval_requests import agree

    from lora_gen_jax.evaluation.lm_eval_model import LoraGenLM

    checkpoint = str(trained().directory)
    prompts = {"one": "say the color of the sun\n\nthe star\nred", "two": "say the kind\n\nthe cat\none"}
    asked, alone = [], {name: [] for name in prompts}
    for i, word in enumerate(("moon", "dog", "fish")):
        for name, prompt in prompts.items():
            kept = {"request_type": "loglikelihood", "doc": {}, "idx": 0, "metadata": (name, i, 1)}
            asked.append(Instance(**kept, arguments=(f"{prompt}\n\nthe {word}", "\nred")))
            alone[name].append(Instance(**kept, arguments=(f"the {word}", "\nred")))
    both = LoraGenLM(checkpoint=checkpoint, prompt_from_task=True, batch_tokens=64, cache=str(tmp_path / "cache"))
    got = both.loglikelihood(asked, disable_tqdm=True)
    for place, (name, prompt) in enumerate(prompts.items()):
        special = LoraGenLM(checkpoint=checkpoint, prompt=prompt, batch_tokens=64)
        agree(got[place::2], special.loglikelihood(alone[name], disable_tqdm=True))
    assert abs(got[0][0] - got[1][0]) > 1e-3
    # Finished requests are kept for each of the models.
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "cache").iterdir()) == 6
    free = [dataclasses.replace(one, arguments=(one.args[0], {"until": [], "max_gen_toks": 3})) for one in asked]
    texts = both.generate_until(free, disable_tqdm=True)
    assert len(texts) == 6
    with raises(ConfigError, "prompt_from_task", "prompt=TEXT", code="whole texts"):
        both.loglikelihood_rolling(asked, disable_tqdm=True)
    with raises(ConfigError, "prompt_from_task", "--apply_chat_template", code="chat"):
        both.apply_chat_template([{"role": "user", "content": "red"}])
    bare = [dataclasses.replace(one, arguments=(f"the {i}", "\nred")) for i, one in enumerate(asked)]
    with raises(DataError, "one", "task one"):
        both.loglikelihood(bare, disable_tqdm=True)
    # A model that goes on makes no weights for what is finished.
    again = LoraGenLM(checkpoint=checkpoint, prompt_from_task=True, batch_tokens=64, cache=str(tmp_path / "cache"))
    monkeypatch.setattr("lora_gen_jax.methods.lora_gen.specialize", lambda *args: pytest.fail("specialized again"))
    assert again.loglikelihood(asked, disable_tqdm=True) == got
    with raises(ConfigError, "prompt_from_task", "prompt and prompt_from_task", code="conflict"):
        LoraGenLM(checkpoint=checkpoint, prompt="x", prompt_from_task=True)


@pytest.mark.filterwarnings("ignore")
def test_eval_runs_tasks_of_lm_eval_beside_our_own(directory, tmp_path, registry):
    """The same task by name here and in lm-eval: the same figures, for every method and number of shots."""
    from lora_gen_jax.evaluation.run import evaluate

    settings = dataclasses.replace(
        trained().eval, batch_tokens=64, limit=4, seed=3, tasks=("arc_easy", "lm_eval/lora_gen_arc_easy")
    )
    config = dataclasses.replace(
        trained(), eval=settings, data=dataclasses.replace(trained().data, dir=directory), workdir=tmp_path / "run"
    )
    results = evaluate(config, trained().directory, tmp_path / "out", [0, 1])
    for methods in results["by_shots"].values():
        for result in methods.values():
            ours, theirs = result["tasks"]["arc_easy"], result["tasks"]["lm_eval/lora_gen_arc_easy"]
            assert (theirs["n"], theirs["metric"], theirs["latency_ms"]) == (4, "acc", None)
            for figure in ("acc", "acc_norm", "stderr", "context_tokens"):
                assert theirs[figure] == pytest.approx(ours[figure], abs=1e-9), figure
            assert result["ave"] == result["ave_seen"] == ours["acc"]
            assert result["ave_unseen"] is None
    tokens = {m: r["tasks"]["lm_eval/lora_gen_arc_easy"]["context_tokens"] for m, r in results["methods"].items()}
    assert tokens["icl"] > tokens["base"] == tokens["lora_gen"]
    # Scored with its shots in the edge's context, every method would be in-context learning.
    alone = dataclasses.replace(settings, tasks=("lm_eval/lora_gen_arc_easy",), limit=1)
    with raises(DataError, "lora_gen_arc_easy", "--num_fewshot", "--limit"):
        evaluate(dataclasses.replace(config, eval=alone), trained().directory, tmp_path / "alone", [1])
    unknown = dataclasses.replace(settings, tasks=("lm_eval/nothing",))
    with raises(ConfigError, "eval.tasks", "'nothing'"):
        evaluate(dataclasses.replace(config, eval=unknown), None, tmp_path / "none")


@pytest.mark.parametrize(
    ("method", "data"),
    [("lora", {"edge_reads_prompt": True, "edge_length": 96}), ("autocompressor", {"edge_prompt_length": 48})],
)
def test_a_method_reads_the_prompt_in_tasks_of_lm_eval_as_in_our_own(directory, tmp_path, registry, method, data):
    """A LoRA trained behind the prompt, and soft tokens, of which lm-eval knows nothing."""
    from lora_gen_jax.evaluation.run import evaluate
    from lora_gen_jax.training.loop import train

    base = trained()
    config = dataclasses.replace(
        base,
        method=method,
        compressor=CompressorConfig(summary_tokens=3, segments=2),
        data=dataclasses.replace(base.data, **data),
        train=dataclasses.replace(base.train, steps=2, warmup_steps=1, validation_batches=0),
        workdir=tmp_path / "run",
    )
    train(config)
    tasks = ("arc_easy", "lm_eval/lora_gen_arc_easy")
    settings = dataclasses.replace(
        base.eval, batch_tokens=64, limit=3, tasks=tasks, methods=("base", "icl", method), latency=False
    )
    config = dataclasses.replace(config, eval=settings, data=dataclasses.replace(config.data, dir=directory))
    methods = evaluate(config, None, tmp_path / "out", [1])["methods"]
    for result in methods.values():
        ours, theirs = (result["tasks"][task] for task in tasks)
        assert (theirs["acc"], theirs["context_tokens"]) == (ours["acc"], ours["context_tokens"])
    tokens = {name: result["tasks"]["arc_easy"]["context_tokens"] for name, result in methods.items()}
    assert tokens[method] == (tokens["icl"] if method == "lora" else tokens["base"] + 3)
    assert {name: result["prompted"] for name, result in methods.items()} == {"base": False, "icl": True, method: True}


def test_figures_of_lm_eval_that_cannot_stand_beside_accuracies_are_refused():
    better = {"acc": True, "word_perplexity": False, "f1": True}
    found = result_of("t", {"alias": "t", "f1,none": 0.5, "f1_stderr,none": "N/A"}, better)
    assert (found["acc"], found["stderr"], found["metric"]) == (0.5, None, "f1")
    found = result_of("t", {"acc,first": 0.25, "acc,second": 0.75, "acc_stderr,first": 0.1}, better)
    assert (found["acc"], found["stderr"]) == (0.25, 0.1)
    with raises(DataError, "eval.tasks", "lm_eval/t", "word_perplexity"):
        result_of("t", {"word_perplexity,none": 45.2}, better)
    assert [seen_of(f"lm_eval/{t}") for t in ("arc_easy", "lora_gen_piqa", "mmlu")] == [True, False, None]
