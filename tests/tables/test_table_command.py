"""The command from flags to tables.md: what it starts, what it keeps, what it says; one job done for real."""

import json
import os

import pytest
from helpers import experiment

from lora_gen_jax.errors import CheckpointError, ConfigError, OutputError
from lora_gen_jax.evaluation import choices
from lora_gen_jax.tables import command, latency, pool, work
from lora_gen_jax.tables.command import TableFlags, one_job, parsed, table_main, tables_from_args
from lora_gen_jax.tables.jobs import make_jobs, write_result
from lora_gen_jax.tables.spec import read_tables

TEXT = """
import dataclasses
import json
from pathlib import Path

from lora_gen_jax.config_file import from_json
from lora_gen_jax.tables.spec import Tables


def get_tables():
    base = from_json(json.loads(Path(__file__).with_name("base.json").read_text()))
    agent = dataclasses.replace(base, name="")
    return Tables(base, {"lora": {"method": "lora"}, "lora_gen": {}}, agent, seeds=(0, 1), shots=(1, 2))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.fixture
def path(root, tmp_path):
    """A config file on a tiny pair."""
    from lora_gen_jax.config_file import to_json

    config = experiment(root, tmp_path / "run", steps=2, validation_batches=0)
    (tmp_path / "base.json").write_text(json.dumps(to_json(config)))
    (tmp_path / "few.py").write_text(TEXT)
    return tmp_path / "few.py"


@pytest.fixture
def started(monkeypatch):
    """Commands that would have been started; each job leaves a result at once, unless its name is in "broken"."""
    found = {"commands": [], "broken": set()}

    class Ended:
        def __init__(self, status):
            self.status = status

        def poll(self):
            return self.status

    def start(arguments, job):
        found["commands"].append(list(arguments))
        if job.name not in found["broken"]:
            write_result(job, fake_values(job))
        return Ended(1 if job.name in found["broken"] else 0)

    monkeypatch.setattr(pool, "start_process", start)
    monkeypatch.setattr(pool, "platform", lambda: "cpu")
    monkeypatch.setattr(pool, "cores", lambda: [3, 5])
    monkeypatch.setattr(latency, "measure_costs", lambda tables, rows: {"answers": {}, "workload": {}, "rows": rows})
    monkeypatch.setattr("lora_gen_jax.tables.cost_layout.table_13", lambda results, costs: None)
    return found


def fake_values(job):
    accuracy = 0.5 + 0.1 * job.seed
    tasks = {"warm": {"acc": accuracy, "n": 4, "context_tokens": 3.0}}
    scores = {"tasks": tasks, "groups": {"seen": {"accuracy": accuracy}}, "ave": accuracy, "har": accuracy}
    scores |= {"ave_seen": accuracy, "ave_unseen": None}
    shots = {str(n): dict.fromkeys(job.methods(n), scores) for n in job.shots}
    known = {"steps": job.config.train.steps, "machine": {"device": "d", "cpus": 2, "system": "s"}, "versions": {}}
    return {"shots": shots, "seen": {"warm": True}, "agent": {}, **known}


def test_every_job_is_started_once_and_the_tables_are_written(path, started, capsys):
    arguments = [str(path), "--seeds", "0,2", "--train.learning-rate", "0.5", "--agent.train.steps", "9"]
    table_main(arguments)
    names = [arguments[arguments.index("--job") + 1] for arguments in started["commands"]]
    assert sorted(names) == sorted(f"{run}/{seed}" for run in ("base", "lora", "lora_gen", "agent") for seed in (0, 2))
    assert started["commands"][0][: 4 + len(arguments)] == [*command.COMMAND, *arguments]
    assert {line[-1] for line in started["commands"]} == {"3", "5"}
    saved = json.loads((path.parent / "run" / "tables.json").read_text())
    (two,) = [one for one in saved["tables"] if one["table"] == 2]
    (lora,) = [row for row in two["rows"] if row["method"] == "LoRA, no prompt"]
    assert lora["AVE"]["n"] == 2
    assert lora["AVE"]["mean"] == pytest.approx(60)
    assert lora["AVE"]["stderr"] == pytest.approx(10)
    assert saved["costs"]["rows"] == ["lora", "lora_gen"]
    text = (path.parent / "run" / "tables.md").read_text()
    assert "| LoRA, no prompt | 60.0 ± 10.0 |" in text
    assert "60.0 ± 10.0" in capsys.readouterr().out
    result = json.loads((path.parent / "run" / "agent" / "seed-2" / "result.json").read_text())
    assert (result["settings"]["train"]["steps"], result["settings"]["train"]["learning_rate"]) == (9, 0.01)
    result = json.loads((path.parent / "run" / "lora" / "seed-2" / "result.json").read_text())
    assert (result["settings"]["train"]["steps"], result["settings"]["train"]["learning_rate"]) == (2, 0.5)


def test_the_same_command_goes_on_and_a_changed_one_does_not(path, started, capsys):
    table_main([str(path), "--only", "lora,base", "--seeds", "0"])
    assert len(started["commands"]) == 2
    table_main([str(path), "--only", "lora", "--seeds", "0,1"])
    assert [line[line.index("--job") + 1] for line in started["commands"][2:]] == ["lora/1"]
    table_main([str(path), "--only", "lora", "--seeds", "0,1"])
    assert len(started["commands"]) == 3
    assert "everything is trained and scored" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"train\.steps: 2 -> 3"):
        table_main([str(path), "--only", "lora", "--seeds", "0", "--train.steps", "3"])


def test_a_failing_job_gives_status_1_and_dashes(path, started, capsys):
    started["broken"] = {"lora_gen/0", "lora_gen/1"}
    with pytest.raises(SystemExit) as raised:
        table_main([str(path)])
    assert raised.value.code == 1
    assert len(started["commands"]) == 8
    assert "failed: lora_gen/0, lora_gen/1; the same command tries again" in capsys.readouterr().err
    text = (path.parent / "run" / "tables.md").read_text()
    assert "| LoRA-Gen | – | – |" in text
    started["broken"] = set()
    table_main([str(path)])
    assert len(started["commands"]) == 10


def test_out_takes_the_tables(path, started, tmp_path):
    table_main([str(path), "--only", "lora", "--out", str(tmp_path / "there")])
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["tables.json", "tables.md"]
    assert not (tmp_path / "run" / "tables.md").exists()
    with pytest.raises(OutputError, match="there exists already"):
        table_main([str(path), "--out", str(tmp_path / "there")])


def test_costs_that_cannot_be_measured_do_not_lose_the_tables(path, started, monkeypatch, capsys):
    def fails(tables, rows):
        raise ConfigError("the prompt is too long")

    monkeypatch.setattr(latency, "measure_costs", fails)
    with pytest.raises(SystemExit):
        table_main([str(path), "--only", "lora"])
    assert "costs cannot be measured: the prompt is too long" in capsys.readouterr().err
    assert (path.parent / "run" / "tables.md").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "a"], "--seeds is 'a'"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--only", "loar"], "did you mean lora"),
        (["--train.steps", "0"], r"train\.steps is 0"),
        (["--agent.train.warmup-steps", "5"], r"train\.warmup_steps = 5"),
    ],
)
def test_wrong_flags_are_errors_before_anything_starts(path, started, flags, message):
    with pytest.raises(ConfigError, match=message):
        table_main([str(path), *flags])
    assert started["commands"] == []


def test_a_misspelt_flag_and_no_file(path):
    with pytest.raises(SystemExit) as raised:
        table_main([str(path), "--train.stepz", "3"])
    assert raised.value.code == 2
    with pytest.raises(ConfigError, match="name a config file first"):
        table_main(["--seeds", "0"])


def test_agent_flags_without_an_agent_table(path):
    path.write_text(TEXT.replace("{}}, agent,", "{}},"))
    flags, rest = parsed([str(path), "--agent.train.steps", "3"])
    assert flags == TableFlags()
    with pytest.raises(ConfigError, match=r"has no agent table: leave --agent\.train\.steps out"):
        tables_from_args(flags, rest)


def test_one_job_is_done_in_this_process(path, monkeypatch):
    done, pinned = [], []
    monkeypatch.setattr(work, "do", lambda tables, job: done.append(job))
    monkeypatch.setattr(pool, "pin", pinned.append)
    monkeypatch.setattr(pool, "end_with_parent", lambda: None)
    table_main([str(path), "--train.steps", "5", "--job", "lora_gen/1", "--core", "1"])
    assert [job.name for job in done] == ["lora_gen/1"]
    assert done[0].config.train.steps == 5
    assert pinned == [1]
    with pytest.raises(ConfigError, match="did you mean lora/1"):
        table_main([str(path), "--job", "lroa/1"])
    assert one_job(["few.py"]) == (["few.py"], None)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot keep a process to a core")
def test_a_process_can_be_kept_to_a_core():
    before = pool.cores()
    try:
        pool.pin(before[-1])
        assert pool.cores() == before[-1:]
    finally:
        os.sched_setaffinity(0, before)


def test_jobs_are_really_done(path, monkeypatch):
    monkeypatch.setattr(choices, "latency", lambda *args: 1.0)
    tables = read_tables(path)
    jobs = {job.name: job for job in make_jobs(tables)}
    for name in ("base/1", "lora/1"):
        work.do(tables, jobs[name])
    base, lora = (json.loads(jobs[name].result.read_text()) for name in ("base/1", "lora/1"))
    assert {n: list(methods) for n, methods in base["shots"].items()} == {"1": ["icl"], "2": ["base", "icl"]}
    assert {n: list(methods) for n, methods in lora["shots"].items()} == {"2": ["lora"]}
    score = lora["shots"]["2"]["lora"]
    assert set(score["tasks"]) == {"warm", "count"}
    assert score["ave"] == pytest.approx(sum(task["acc"] for task in score["tasks"].values()) / 2)
    assert score["groups"]["seen"]["n"] == sum(task["n"] for task in score["tasks"].values()) == 4
    assert {task["latency_ms"] for task in score["tasks"].values()} == {score["groups"]["seen"]["latency_ms"]} == {None}
    assert (lora["steps"], base["steps"]) == (2, 0)
    assert (lora["trained_parameters"] > 0) > base["trained_parameters"]
    # The prompt stands in the context of icl alone, and grows with the shots.
    tokens = [
        base["shots"][n][m]["tasks"]["warm"]["context_tokens"] for n, m in (("2", "base"), ("1", "icl"), ("2", "icl"))
    ]
    assert tokens[0] < tokens[1] < tokens[2]
    assert score["tasks"]["warm"]["context_tokens"] == tokens[0]
    assert not (jobs["lora/1"].config.directory / ".unfinished").exists()


def test_costs_are_measured_for_a_real_prompt_and_read_again(path, monkeypatch):
    tables, calls = read_tables(path), []
    monkeypatch.setattr(latency, "answers", lambda *args: calls.append(args) or {"answers": {"icl": {}}})
    monkeypatch.setattr(latency, "training_costs", lambda *args: calls.append(args) or {"lora": {"step_ms": 1.0}})
    tables.directory.mkdir()
    found = latency.measure_costs(tables, ["lora", "lora_gen"])
    (_, _, works, configs), (_, _, instruction, query, _) = calls
    assert list(works) == [1, 2]
    assert len(works[1].whole) < len(works[2].whole)
    assert works[1].query == works[2].query
    assert (instruction, query) == (len(works[2].cloud_prompt), len(works[2].query) + works[2].new_tokens)
    assert {row: config.method for row, config in configs.items()} == {"lora": "lora", "lora_gen": "lora_gen"}
    assert latency.measure_costs(tables, ["lora", "lora_gen"]) == json.loads(json.dumps(found))
    assert len(calls) == 2
    latency.measure_costs(tables, ["lora_gen"])
    assert len(calls) == 4


def test_training_costs_alone_are_measured_after_a_stop(path, monkeypatch):
    tables, calls = read_tables(path), []
    tables.directory.mkdir()

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "answers", lambda *args: calls.append("answers") or {"answers": {"icl": {}}})
    monkeypatch.setattr(latency, "training_costs", stopped)
    with pytest.raises(KeyboardInterrupt):
        latency.measure_costs(tables, ["lora"])
    monkeypatch.setattr(latency, "training_costs", lambda *args: {"lora": {}})
    assert latency.measure_costs(tables, ["lora"])["answers"] == {"icl": {}}
    assert calls == ["answers"]
