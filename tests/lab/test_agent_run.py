"""The agent command on a tiny pair: five rows, two groups, outputs that are kept, and flags."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from helpers import raises, trained, write_config, write_rows

from lora_gen_jax.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.errors import CheckpointError, ConfigError, DataError, OutputError
from lora_gen_jax.evaluation import answers, request_runner
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.task import System
from lora_gen_jax.inference.decode import Generation
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.lab.agent import command as agent_command
from lora_gen_jax.lab.agent import outputs as agent_scoring
from lora_gen_jax.lab.agent import run as agent_run
from lora_gen_jax.lab.agent.command import AgentFlags, agent_main, scored_tasks, with_training_rows
from lora_gen_jax.lab.agent.outputs import Writer, as_read, blank_line, context_ids
from lora_gen_jax.lab.agent.table import AGENT_ROWS
from lora_gen_jax.models import load_model
from lora_gen_jax.training.loop import train
from lora_gen_jax.training.prepare import prepare_directory

CLOUD = "say the name of the {}\n"
CALL = "Thought: Do I need to use a tool? Yes\nAction: {}\nAction Input: red\nObservation:"
NO = "Thought: Do I need to use a tool? No\nAI: no"


def rows(tool, count=3):
    asked = [(f"color {thing}", CALL.format(tool)) for thing in ("sun", "moon", "star", "cat")[:count]]
    asked[-1] = (asked[-1][0], NO)
    edge = "Previous conversation:\nNew input: {}"
    return [{"instruction": CLOUD.format(tool) + edge.format(x), "input": "", "output": y} for x, y in asked]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    _shorten(monkeypatch)


def _shorten(patch):
    patch.setattr(answers, "LATENCY_REPEATS", 1)
    patch.setattr(answers, "LATENCY_DOCUMENTS", 1)
    patch.setattr(agent_scoring, "LATENCY_TASKS", 1)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(arguments of a command, its work directory) with rows of the user's own."""
    root = tmp_path_factory.mktemp("agent")
    data = DataConfig(
        tasks=(),
        prompts_per_step=8,
        prompts_per_row=2,
        cloud_length=64,
        edge_length=96,
        queries_per_prompt=2,
        response_slots=64,
        query_length=64,
        min_shots=0,
        max_shots=0,
    )
    train = TrainConfig(steps=2, warmup_steps=1, learning_rate=1e-3, validation_batches=0)
    config = dataclasses.replace(
        trained(), name="", workdir=root / "run", data=data, train=train, eval=EvalConfig(prompt_limit=64)
    )
    files = {name: write_rows(root / name, rows(tool)) for name, tool in (("seen", "sun"), ("unseen", "moon"))}
    write_rows(root / "train", rows("sun", 4) + rows("fish", 4))
    arguments = [write_config(root / "tiny.py", config), "--train-rows", root / "train"]
    arguments += ["--seen-rows", files["seen"], "--rows", files["unseen"]]
    arguments += ["--untrained-checkpoint", trained().directory]
    return [str(a) for a in arguments], root / "run"


def _trained(config):
    """A run as `train` leaves it: one LoRA is really trained, all else is a copy of a finished run."""
    if config.data.edge_reads_prompt:
        train(config)
        return
    prepare_directory(config)
    other = trained().directory if config.method == "lora_gen" else config.directory.parent / "lora_with_tools"
    (newest,) = sorted((other / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))[-1:]
    shutil.copytree(newest, config.directory / "checkpoints" / str(config.train.steps))


@pytest.fixture(scope="module")
def report(setting):
    arguments, directory = setting
    with pytest.MonkeyPatch.context() as patch:
        _shorten(patch)
        patch.setattr(agent_run, "train", _trained)
        agent_main(arguments)
    return json.loads((directory / "agent.json").read_text())


def test_five_rows_on_seen_and_unseen_tools(report, setting):
    assert list(report["methods"]) == list(AGENT_ROWS)
    for name, groups in report["methods"].items():
        assert list(groups) == ["seen", "unseen"]
        for title, metrics in groups.items():
            outputs = report["outputs"][name][title]
            assert metrics["n"] == len(outputs) == 3
            assert metrics["sr"] == pytest.approx(sum(row["score"]["success"] for row in outputs) / 3)
            assert (metrics["compression"] > 1.3) != AGENT_ROWS[name].reads_prompt
            assert (metrics["compression"] == 1) == AGENT_ROWS[name].reads_prompt
            assert metrics["latency_ms"] > 0
    assert [row["gold"] for row in report["outputs"]["base_with_tools"]["unseen"]] == [CALL.format("moon")] * 2 + [NO]
    assert {p.name for p in setting[1].iterdir() if p.is_dir()} == {
        "lora",
        "lora_with_tools",
        "lora_gen",
        "agent_requests",
    }
    saved = json.loads((setting[1] / "lora_with_tools" / "config.json").read_text())
    assert saved["method"] == "lora"
    assert saved["data"]["edge_reads_prompt"] is True
    assert report["published"]["average"]["lora_gen"] == 91.5


def test_a_second_run_trains_and_writes_nothing_anew(report, setting, monkeypatch, tmp_path, capsys):
    anew = AssertionError("it was finished")

    def fail(*args, **kwargs):
        raise anew

    arguments, directory = setting
    monkeypatch.setattr(agent_run, "train", fail)
    monkeypatch.setattr(request_runner, "generate", fail)
    agent_main([*arguments, "--out", str(tmp_path / "out")])
    again = json.loads((tmp_path / "out" / "agent.json").read_text())
    assert again["outputs"] == report["outputs"]
    printed = capsys.readouterr().out
    for title in (
        "LoRA-Gen, trained on tools",
        "SR_args",
        "Tool calls, unseen tools",
        "not measured here",
    ):
        assert title in printed
    # Outputs are kept by their content: where one is lost it is written again.
    (kept,) = (directory / "agent_requests").iterdir()
    text = kept.read_text()
    kept.write_text("\n".join(text.splitlines()[:-1]) + "\n")
    with pytest.raises(AssertionError) as raised:
        agent_main(arguments)
    assert raised.value is anew
    kept.write_text(text)


def test_a_generator_that_is_given_is_scored_and_nothing_is_trained(report, setting, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise AssertionError("trained")

    monkeypatch.setattr(agent_run, "train", fail)
    elsewhere = [*setting[0], "--workdir", str(tmp_path / "new"), "--methods", "base_with_tools", "lora_gen"]
    agent_main([*elsewhere, "--checkpoint", str(trained().directory)])
    found = json.loads((tmp_path / "new" / "agent.json").read_text())
    assert found["outputs"] == {name: report["outputs"][name] for name in ("base_with_tools", "lora_gen")}
    assert str(trained().directory) in found["checkpoints"]["lora_gen"]["path"]
    assert not list((tmp_path / "new").glob("rows-*"))


def test_what_is_refused_before_anything_is_trained(setting, tmp_path, monkeypatch):
    arguments, _ = setting

    def fail(*args, **kwargs):
        raise AssertionError("trained")

    monkeypatch.setattr(agent_run, "train", fail)
    elsewhere = [*arguments, "--workdir", str(tmp_path / "new")]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    bad = write_rows(tmp_path / "bad", [{**rows("sun")[0], "output": "I will draw it."}])
    long = write_rows(
        tmp_path / "long", [{**rows("sun")[0], "instruction": "sun " * 99 + rows("sun")[0]["instruction"]}]
    )
    for more, error, field, facts in (
        (["--methods", "base", "lora"], ConfigError, "--methods", ("'base'", "base_with_tools")),
        (["--limit", "0"], ConfigError, "--limit", (0,)),
        (["--out", tmp_path / "full"], OutputError, "--out", (tmp_path / "full",)),
        (["--rows", bad], DataError, "gold_text", ("'I will draw it.'",)),
        (["--rows", long], DataError, "eval.prompt_limit", ("cloud tokens", 64)),
        (["--data.query-length", "158", "--data.edge-length", "158"], ConfigError, "data.query_length", (158, 160)),
        (["--untrained-checkpoint", tmp_path], CheckpointError, "--checkpoint", (tmp_path,)),
    ):
        with raises(error, field, *facts):
            agent_main([*map(str, [*elsewhere, *more])])
    without = [a for a in elsewhere if a not in ("--untrained-checkpoint", str(trained().directory))]
    with raises(CheckpointError, "--untrained-checkpoint", "--untrained-checkpoint", "lora_gen_untrained"):
        agent_main(without)


@pytest.mark.parametrize(("flags", "count"), [((), 2), (("--limit", "1"), 1)])
def test_without_a_limit_of_its_own_the_configs_holds(setting, tmp_path, monkeypatch, flags, count):
    scored = []
    monkeypatch.setattr(agent_command, "score_agents", lambda config, tasks, *rest: scored.extend(tasks))
    agent_main([*setting[0], "--workdir", str(tmp_path), "--eval.limit", "2", *flags])
    assert [len(task.test) for task in scored] == [count, count]


def test_flags_take_many_values_and_the_rest_is_the_configs(tmp_path, monkeypatch):
    path, asked = str(write_config(tmp_path / "c.py", trained())), []
    monkeypatch.setattr(agent_command, "scored_tasks", lambda *args: asked.append(args))
    monkeypatch.setattr(agent_command, "with_training_rows", lambda config, flags: config)
    monkeypatch.setattr(agent_command, "score_agents", lambda *args: None)
    agent_main([path, "--rows", "a", "b", "--train.steps", "3", "--seen-rows", "--limit=4"])
    agent_main([path, "--seen-rows", "x"])
    (config, many, bare), (_, one, named) = asked
    assert (many.rows, many.seen_rows, many.limit) == ((Path("a"), Path("b")), (), 4)
    assert (config.train.steps, one.seen_rows, bare, named) == (3, (Path("x"),), True, False)


def test_which_rows_are_seen(tmp_path):
    one, two = (write_rows(tmp_path / tool, rows(tool)) for tool in ("sun", "moon"))
    config = trained()

    def seen(flags, bare=False):
        return [(task.seen, len(task.test)) for task in scored_tasks(config, flags, bare)]

    assert seen(AgentFlags(rows=(one,), limit=2)) == [(False, 2)]
    assert seen(AgentFlags(rows=(one,)), bare=True) == [(True, 3)]
    assert seen(AgentFlags(rows=(one,), seen_rows=(two,))) == [(False, 3), (True, 3)]
    embedded = dataclasses.replace(config, eval=EvalConfig(tasks=("pocket_agent", "pocket_agent_unseen")))
    assert [sum(seen == s for seen, _ in chosen(embedded)) for s in (True, False)] == [60, 15]
    with raises(ConfigError, "--seen-rows", "--rows FILE"):
        seen(AgentFlags(), bare=True)
    with raises(ConfigError, "eval.tasks", "eval.tasks", code="none"):
        scored_tasks(dataclasses.replace(config, eval=EvalConfig()), AgentFlags(), False)


def chosen(config):
    return [(task.seen, len(task.test)) for task in scored_tasks(config, AgentFlags(), False)]


def test_training_rows_replace_the_configs_tasks_and_their_weights(tmp_path):
    file = write_rows(tmp_path / "sun", rows("sun"))
    data = DataConfig(tasks=("pocket", "boolq"), source_weights=("boolq=2",))
    config = dataclasses.replace(trained(), data=data, workdir=tmp_path / "run")
    found = with_training_rows(config, AgentFlags(train_rows=(file,))).data
    assert (found.tasks, found.source_weights, len(found.files)) == ((), (), 1)


def test_what_an_agent_loop_reads():
    call, two = CALL.format("A"), CALL.format("A") + " done\n" + CALL.format("B")
    assert as_read(f"\n{call} image/x.png\nThought: more", call, "\n\n") == call.removesuffix("\nObservation:")
    assert as_read(f"\n{two} ", two, "\n\n") == two
    assert as_read(f"{NO}\n\nPrevious conversation:", NO, "\n\n") == NO
    assert as_read(f"{NO}\n\nPrevious", NO, None) == f"{NO}\n\nPrevious"
    assert as_read("Say Observation: no", NO, None) == "Say Observation: no"
    task = Task("t", ("d",), (), [Example("a", "q", NO)], source="x")
    assert blank_line([task]) == "\n\n"
    assert blank_line([task, Task("u", ("d",), (), [Example("a", "q", NO + "\n\nmore")], source="x")]) is None


@pytest.fixture(scope="module")
def edge():
    return load_model(ModelConfig("pocket-edge"))


def test_outputs_come_in_order_whatever_the_batches_are(edge, monkeypatch):
    tasks = list(load_tasks(("pocket_agent_unseen",)).values())[:3]
    asked = []

    def echo(model, contexts, settings):
        asked.append((model.params, len(contexts)))
        return [Generation(list(context), "stop", []) for context in contexts]

    monkeypatch.setattr(request_runner, "generate", echo)
    # Half a page that several toolsets begin with saves too little to be read by itself.
    monkeypatch.setattr(request_runner, "encode_prefix", None)
    for shared, reads in ((True, True), (False, False)):
        asked.clear()

        def named(task, shared=shared):
            return EdgeModel(edge.decoder, "all" if shared else task.name)

        made, done = System(named, reads, lambda task, named=named: named(task).params, not shared), []
        writer = Writer(edge, 40, RequestCache(None, ""))
        written = writer.write(made, tasks, lambda *counts, done=done: done.append(counts))
        assert {name for name, _ in asked} == ({"all"} if shared else {task.name for task in tasks})
        # Requests of a bucket go together, in rows of a power of two.
        assert {rows for _, rows in asked} <= {4, 8, 16, 32}
        assert max(rows for _, rows in asked) <= (32 if shared else 16)
        assert done[-1] == (30, 30)
        assert len(written) == 30
        for row, (task, document) in zip(written, [(t, d) for t in tasks for d in t.test], strict=True):
            assert (row.task, row.document) == (task, document)
            ids = context_ids(edge, task, document, reads)
            assert row.text == edge.encoder.decode(ids)
            assert row.context_tokens == len(ids)
            assert (task.descriptions[0] in row.text) == reads
            assert row.text.endswith(document.query)
