"""Which jobs there are, what is missing after a stop, in which order they run, and what happens when one fails."""

import dataclasses
import json
import os
import signal
import sys

import pytest

from lora_gen_jax.config import Config, EvalConfig, TrainConfig
from lora_gen_jax.config_file import to_json
from lora_gen_jax.errors import CheckpointError, ConfigError
from lora_gen_jax.tables import pool
from lora_gen_jax.tables.jobs import RESULT, chosen, finished, make_jobs, missing, write_result
from lora_gen_jax.tables.results import gather
from lora_gen_jax.tables.spec import Tables, config_of


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pool, "POLL", 0.01)
    monkeypatch.setattr(pool, "GRACE", 0.2)


@pytest.fixture
def tables(tmp_path):
    base = Config(name="few", workdir=tmp_path, train=TrainConfig(steps=100), eval=EvalConfig(limit=3))
    agent = dataclasses.replace(base, name="agent", train=TrainConfig(steps=400))
    runs = {"lora": {"method": "lora"}, "lora_gen": {}, "experts_4": {"generator": {"num_experts": 4}}}
    return Tables(base, runs, agent, seeds=(0, 1))


def done(job, **values):
    """A job's result, as `work.do` writes it."""
    shots = {str(n): {m: {"tasks": {}} for m in job.methods(n)} for n in job.shots}
    known = {"shots": shots, "seen": {}, "steps": 100, "machine": {"cpus": 2}, "versions": {"jax": "1"}}
    write_result(job, known | values)


def test_every_run_and_seed_is_a_job_with_its_own_seeds_and_directory(tables, tmp_path):
    jobs = {job.name: job for job in make_jobs(tables)}
    assert list(jobs) == [
        f"{run}/{seed}" for run in ("base", "lora", "lora_gen", "experts_4", "agent") for seed in (0, 1)
    ]
    config = jobs["experts_4/1"].config
    assert (config.train.seed, config.eval.seed, config.eval.shots, config.eval.latency) == (1, 1, 5, False)
    assert config.generator == dataclasses.replace(tables.base.generator, num_experts=4)
    assert config.directory == tmp_path / "experts_4" / "seed-1"
    assert jobs["lora/0"].config.method == "lora"
    assert jobs["agent/1"].config.train == TrainConfig(steps=400, seed=1)


def test_shots_and_methods_of_each_job(tables):
    jobs = {job.run: job for job in make_jobs(tables)}
    assert [jobs[run].shots for run in ("base", "lora", "lora_gen", "experts_4")] == [(1, 3, 5), (5,), (1, 3, 5), (5,)]
    assert [jobs["base"].methods(n) for n in (1, 3, 5)] == [("icl",), ("icl",), ("base", "icl")]
    assert jobs["experts_4"].methods(5) == ("lora_gen",)
    assert jobs["lora"].methods(5) == ("lora",)


def test_a_change_of_an_unknown_field_names_the_run(tables):
    tables = dataclasses.replace(tables, runs={"odd": {"generator": {"nun_experts": 4}}})
    with pytest.raises(ConfigError, match="run odd changes 'nun_experts', which is no field of GeneratorConfig"):
        config_of(tables, "odd", 0)


def test_a_change_that_cannot_work_names_the_run(tables):
    tables = dataclasses.replace(tables, runs={"odd": {"generator": {"num_experts": 1}}})
    with pytest.raises(ConfigError, match=r"run odd: generator\.top_k is 2"):
        make_jobs(tables)


def test_only_takes_known_runs(tables):
    jobs = make_jobs(tables)
    assert [job.name for job in chosen(tables, jobs, ["lora"])] == ["lora/0", "lora/1"]
    assert chosen(tables, jobs, []) == jobs
    with pytest.raises(ConfigError, match="did you mean lora_gen"):
        chosen(tables, jobs, ["loragen"])


def test_the_longest_come_first_and_finished_ones_not_at_all(tables):
    jobs = make_jobs(tables)
    assert [job.run for job in missing(jobs)][:4] == ["agent", "agent", "lora_gen", "lora_gen"]
    for job in jobs[:-1]:
        done(job)
    assert [job.name for job in missing(jobs)] == ["agent/1"]


def test_half_a_result_is_none(tables):
    job = make_jobs(tables)[2]
    done(job)
    job.result.write_text(job.result.read_text()[:-20])
    assert finished(job) is None
    assert missing([job]) == [job]


def test_another_number_of_shots_is_scored_later(tables):
    done(make_jobs(dataclasses.replace(tables, shots=(1, 5)))[4])
    job = make_jobs(tables)[4]
    assert missing([job]) == [job]
    assert missing([make_jobs(dataclasses.replace(tables, shots=(5,)))[4]]) == []


def test_a_result_of_other_settings_names_the_field(tables):
    done(make_jobs(tables)[2])
    longer = dataclasses.replace(tables.base, train=TrainConfig(steps=200), eval=EvalConfig(limit=9))
    (job,) = [job for job in make_jobs(dataclasses.replace(tables, base=longer)) if job.name == "lora/0"]
    with pytest.raises(CheckpointError) as raised:
        missing([job])
    assert "train.steps: 100 -> 200" in str(raised.value)
    assert "eval.limit: 3 -> 9" in str(raised.value)
    assert "seed-0 holds a run with another config" in str(raised.value)


def test_untrained_results_do_not_depend_on_training(tables):
    done(make_jobs(tables)[0])
    longer = dataclasses.replace(tables, base=dataclasses.replace(tables.base, train=TrainConfig(steps=200)))
    assert missing([make_jobs(longer)[0]]) == []
    other = dataclasses.replace(tables, base=dataclasses.replace(tables.base, eval=EvalConfig(limit=4)))
    with pytest.raises(CheckpointError, match=r"eval\.limit: 3 -> 4"):
        missing([make_jobs(other)[0]])


def test_a_begun_run_of_other_settings_names_the_field(tables):
    job = make_jobs(tables)[2]
    job.config.directory.mkdir(parents=True)
    begun = dataclasses.replace(job.config, train=TrainConfig(steps=7))
    (job.config.directory / "config.json").write_text(json.dumps(to_json(begun)))
    with pytest.raises(CheckpointError, match=r"train\.steps: 7 -> 100"):
        missing([job])


class Fake:
    """A process that ends after some polls; it remembers what was done to it."""

    def __init__(self, polls, status=0):
        self.left, self.status, self.told = polls, status, []

    def poll(self):
        self.left -= 1
        return self.status if self.left < 0 else None

    def terminate(self):
        self.told.append("terminate")

    def kill(self):
        self.told.append("kill")


def test_two_places_are_kept_busy_and_a_failure_does_not_stop_the_others(tables):
    jobs, began, lines = make_jobs(tables)[:6], [], []
    jobs[1].log.parent.mkdir(parents=True)
    jobs[1].log.write_text("".join(f"line {i}\n" for i in range(30)))

    def start(job, place):
        began.append((job.name, place))
        return Fake(6 if job is jobs[0] else 0, status=2 if job is jobs[1] else 0)

    assert pool.run_jobs(jobs, start, 2, lines.append) == [jobs[1]]
    # The first place is held by the long job; the others follow each other in the second.
    assert began == [(jobs[0].name, 0), *((job.name, 1) for job in jobs[1:])]
    text = "\n".join(lines)
    assert f"{jobs[1].name}: failed with status 2" in text
    assert "    line 29\n" in text
    assert "line 14\n" not in text
    assert f"(the whole log: {jobs[1].log})" in text
    assert f"{jobs[0].name}: done" in text
    assert "6 of 6" in text


def test_a_signal_ends_all_processes(tables):
    jobs, made = make_jobs(tables)[:3], []

    def start(job, place):
        made.append(Fake(10**9))
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return made[-1]

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(pool.TablesStopped, match="stopped by SIGTERM: the same command goes on") as raised:
        pool.run_jobs(jobs, start, 2, lambda line: None)
    assert raised.value.signal == signal.SIGTERM
    assert [process.told for process in made] == [["terminate", "kill"]] * 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_real_process_logs_and_fails(tables):
    job, lines = make_jobs(tables)[0], []
    code = "import sys; print('it began'); sys.exit('it broke')"

    def start(job, place):
        return pool.start_process([sys.executable, "-c", code], job)

    assert pool.run_jobs([job], start, 1, lines.append) == [job]
    assert job.log.read_text() == "it began\nit broke\n"
    assert "    it broke\n" in "\n".join(lines)


def test_gathered_by_row_seed_and_shots(tables):
    jobs = make_jobs(tables)
    for job in jobs:
        if job.run != "experts_4":
            done(job, **({"agent": {"lora": {}}} if job.run == "agent" else {}))
    found = gather(jobs)
    assert sorted(found["runs"]) == ["base", "icl", "lora", "lora_gen"]
    assert {seed: list(shots) for seed, shots in found["runs"]["icl"].items()} == {
        "0": ["1", "3", "5"],
        "1": ["1", "3", "5"],
    }
    assert list(found["runs"]["base"]["0"]) == ["5"]
    assert found["agent"] == {"0": {"lora": {}}, "1": {"lora": {}}}
    assert found["facts"]["lora"]["1"] == {"steps": 100}
    assert found["settings"]["experts_4"]["generator"]["num_experts"] == 4
    assert (found["shots"], found["seeds"], found["machine"]) == ("5", ["0", "1"], {"cpus": 2})
    assert jobs[0].result.name == RESULT
