"""Evaluations with the model `lora_gen`: stopped and gone on with, specialized, and by the command line."""

import json

import numpy as np
import pytest
from helpers import WORDS, raises, trained, write_model
from lm_eval_requests import agree, instances, loglikelihood_arguments, words

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.cli import main
from lora_gen_jax.errors import CheckpointError, ConfigError, OutputError
from lora_gen_jax.evaluation import request_runner
from lora_gen_jax.evaluation.lm_eval_command import lm_eval_main, with_defaults
from lora_gen_jax.evaluation.lm_eval_model import LoraGenLM
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.rows import Request
from lora_gen_jax.inference.scoring import score
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import load_pair
from lora_gen_jax.training.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("lm_eval") / "model", seed=7, vocab_size=7 + len(WORDS))


def stop_after(monkeypatch, name, calls):
    """The function of the runner of that name, counted; it fails when it is called once more than `calls`."""
    real, made = getattr(request_runner, name), []

    def counted(*args, **kwargs):
        if len(made) == calls:
            raise KeyboardInterrupt
        result = real(*args, **kwargs)
        made.append(len(args[1]))
        return result

    monkeypatch.setattr(request_runner, name, counted)
    return made


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_a_stopped_evaluation_goes_on_where_it_was(directory, tmp_path, monkeypatch, kind):
    """Stopped in the middle, with half a line written: the same results, and nothing is computed twice."""
    if kind == "loglikelihood":
        arguments, name = loglikelihood_arguments(), "score"
    else:
        sampled = {"until": ["sun"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "top_k": 20}
        rng = np.random.default_rng(9)
        arguments, name = [(words(rng, n), sampled) for n in (2, 3, 20, 40, 41, 70, 80, 90)] * 2, "texts"
    requests = instances(kind, arguments)

    def run(cache):
        model = LoraGenLM(model=str(directory), dtype="float32", batch_tokens=64, cache=str(cache))
        return getattr(model, kind)(requests, disable_tqdm=True)

    with monkeypatch.context() as patch:
        whole_calls = stop_after(patch, name, None)
        whole = run(tmp_path / "whole")
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        first_calls = stop_after(patch, name, 2)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    (file,) = stopped.iterdir()
    with file.open("ab") as end:
        end.write(b'{"key": "00ff", "res')
    with monkeypatch.context() as patch:
        calls = stop_after(patch, name, None)
        assert run(stopped) == whole
    assert first_calls + calls == whole_calls
    assert len(calls) == len(whole_calls) - 2 > 0
    with monkeypatch.context() as patch:
        assert stop_after(patch, name, 0) == []
        assert run(stopped) == whole


def test_results_of_one_model_are_not_those_of_another(directory, tmp_path):
    other = write_model(tmp_path / "other", seed=4)
    requests = instances("loglikelihood", [("red green", " blue")])
    made = []
    for settings in ({"model": str(directory)}, {"model": str(other)}, {"model": str(directory), "dtype": "bfloat16"}):
        model = LoraGenLM(**({"dtype": "float32"} | settings), cache=str(tmp_path / "cache"))
        made += model.loglikelihood(requests, disable_tqdm=True)
    assert len(set(made)) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with raises(OutputError, "cache", tmp_path / "file", "cache=DIR", code="unwritable"):
        RequestCache(tmp_path / "file", "ab")


def by_hand(config, prompt, requests, edge_ids):
    """Scores of a model that is specialized and merged by the library's own functions."""
    loaded, pair = load_checkpoint(config.directory), load_pair(config)
    generator = make_generator(config, pair)
    made = specialize(generator, loaded.variables, pair.cloud.params, [pair.cloud.encoder.prompt(prompt)])
    merged = merge(pair.edge.params, made.adapter.select(0))
    pairs = [Request(*edge_ids(*request.args)) for request in requests]
    pairs = [Request(context, [continuation]) for context, continuation in pairs]
    found = score(EdgeModel(pair.edge.decoder, merged), pairs, batch_tokens=64)
    return [(one.logprobs[0], one.is_greedy[0]) for one in found]


def test_the_specialized_model_is_the_one_merged_by_hand(tmp_path):
    config, prompt = trained(), "say the color of the sun\n\nwhat kind is the star ?\nred"
    (tmp_path / "prompt.txt").write_text(prompt)
    requests = instances("loglikelihood", [("what kind is the moon ?", f"\n{w}") for w in ("red", "two", "sun")])
    checkpoint = str(config.directory)
    special = LoraGenLM(checkpoint=checkpoint, prompt=f"@{tmp_path / 'prompt.txt'}", batch_tokens=64)
    got = special.loglikelihood(requests, disable_tqdm=True)
    agree(got, by_hand(config, prompt, requests, special._encode_pair))
    assert got[0][1], "the task's answer is not the greedy one"

    main(["specialize", "--checkpoint", checkpoint, "--prompt", prompt, "--out", str(tmp_path / "special")])
    stored = LoraGenLM(specialization=str(tmp_path / "special"), batch_tokens=64)
    agree(stored.loglikelihood(requests, disable_tqdm=True), got)

    base = LoraGenLM(model=config.edge.source, batch_tokens=64)
    plain = base.loglikelihood(requests, disable_tqdm=True)
    assert np.abs(np.subtract([p[0] for p in plain], [g[0] for g in got])).min() > 0.01
    again = LoraGenLM(checkpoint=checkpoint, prompt=prompt, batch_tokens=64)
    assert again.subject.identity == special.subject.identity
    assert len({model.subject.identity for model in (special, stored, base)}) == 3
    with raises(ConfigError, "prompt", checkpoint, "prompt=TEXT", code="method"):
        LoraGenLM(checkpoint=checkpoint)
    with raises(CheckpointError, "edge.source"):
        LoraGenLM(checkpoint=checkpoint, prompt=prompt, model=str(write_model(tmp_path / "other", seed=9)))


def test_an_evaluation_by_the_command_line_writes_its_results(directory, tmp_path, capsys):
    rows = [
        {"query": f"what kind is the {w} ?", "choices": ["red", "green tree", "sun"], "gold": i % 3, "answer": "red"}
        for i, w in enumerate(WORDS[:6])
    ]
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}, "cache_dir": str(tmp_path / "datasets")},
        "test_split": "test",
        "fewshot_split": "test",
        "num_fewshot": 2,
        "doc_to_text": "{{query}}",
    }
    choice = {"doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]}
    free = {"doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}]}
    free["generation_kwargs"] = {"until": ["sun"], "max_gen_toks": 4}
    (tmp_path / "tasks").mkdir()
    for name, kind, more in (("tiny_choice", "multiple_choice", choice), ("tiny_text", "generate_until", free)):
        # JSON is YAML.
        text = json.dumps({"task": name, "output_type": kind, **source, **more})
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    flags = ["--include_path", str(tmp_path / "tasks"), "--tasks", "tiny_choice,tiny_text"]
    flags += ["--model_args", f"model={directory},dtype=float32,batch_tokens=64,cache={tmp_path / 'cache'}"]
    lm_eval_main([*flags, "--output_path", str(tmp_path / "out"), "--log_samples"])
    assert "tiny_choice" in capsys.readouterr().out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert {"acc,none", "acc_stderr,none"} <= set(results["results"]["tiny_choice"])
    assert "exact_match,none" in results["results"]["tiny_text"]
    model = LoraGenLM(model=str(directory), dtype="float32")
    assert results["config"]["model"] == "lora_gen"
    assert results["config"]["lora_gen"]["edge"] == model.subject.edge.fingerprint
    assert len((tmp_path / "cache" / f"requests-{model.subject.identity}.jsonl").read_text().splitlines()) == 6 * 3 + 6


def test_the_commands_defaults_give_way():
    def given(*arguments):
        return with_defaults(list(arguments), "TASKS")

    front = ["run", "--model", "lora_gen", "--batch_size", "auto", "--include_path", "TASKS"]
    assert given("--tasks", "a") == [*front, "--tasks", "a"]
    assert given("run", "--model", "hf") == [*front, "--model", "hf"]
    assert given("--config=x.yaml") == ["run", "--include_path", "TASKS", "--config=x.yaml"]
    assert given("--include_path", "mine") == [*front[:5], "--include_path", "mine"]
    assert given("ls", "tasks") == ["ls", "tasks", "--include_path", "TASKS"]
    assert given("--help") == ["--help"]
    data = given("--data.dir", "rows", "--tasks", "a", "--data.tfds_dir=prepared")
    assert data == [*front, "--tasks", "a", "--metadata", '{"data_dir": "rows", "tfds_dir": "prepared"}']
    with raises(ConfigError, "--data.dir", "--data.dir"):
        given("--data.dir")
