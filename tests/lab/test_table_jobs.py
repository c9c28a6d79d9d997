"""Which jobs there are, what is missing after a stop or a change, and what they leave."""

import dataclasses
import json

import pytest
from helpers import raises

from lora_gen_jax.config import TrainConfig
from lora_gen_jax.config_file import to_json
from lora_gen_jax.errors import CheckpointError, ConfigError, DataError
from lora_gen_jax.lab.tables.jobs import (
    RESULT,
    chosen,
    content_digest,
    finished,
    make_jobs,
    missing,
    outdated,
    write_result,
)
from lora_gen_jax.lab.tables.output import gather
from lora_gen_jax.lab.tables.spec import config_of


def done(job, **values):
    """A job's result, as `work.do` writes it."""
    shots = {str(n): {m: {"tasks": {}} for m in job.methods(n)} for n in job.shots}
    known = {"shots": shots, "seen": {}, "steps": 100, "machine": {"cpus": 2}, "versions": {"jax": "1"}}
    known["agent"] = {method: {} for method in job.agent_methods}
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
    with raises(ConfigError, "runs.odd.nun_experts", "run odd", "GeneratorConfig"):
        config_of(tables, "odd", 0)


def test_a_change_that_cannot_work_names_the_run(tables):
    tables = dataclasses.replace(tables, runs={"odd": {"generator": {"num_experts": 1}}})
    with raises(ConfigError, "generator.top_k", "run odd", 2):
        make_jobs(tables)


def test_only_takes_known_runs(tables):
    jobs = make_jobs(tables)
    assert [job.name for job in chosen(tables, jobs, ["lora"])] == ["lora/0", "lora/1"]
    assert chosen(tables, jobs, []) == jobs
    with raises(ConfigError, "--only", "lora_gen", "base, lora"):
        chosen(tables, jobs, ["loragen"])
    with raises(ConfigError, "--only", "'xyz'", "base, lora"):
        chosen(tables, jobs, ["xyz"])


def test_what_is_finished_is_not_missing(tables):
    jobs = make_jobs(tables)
    assert missing(jobs) == jobs
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
    # The base model is scored with the most shots alone.
    done(make_jobs(dataclasses.replace(tables, shots=(1, 5)))[0])
    fewer = make_jobs(dataclasses.replace(tables, shots=(1,)))[0]
    assert missing([fewer]) == [fewer]


def test_a_result_of_other_settings_names_the_field(tables):
    done(make_jobs(tables)[2])
    longer = dataclasses.replace(tables.base, train=TrainConfig(steps=200))
    (job,) = [job for job in make_jobs(dataclasses.replace(tables, base=longer)) if job.name == "lora/0"]
    with raises(CheckpointError, "--workdir", "lora/seed-0", "train.steps: 100 -> 200", code="another config"):
        missing([job])


def test_untrained_results_do_not_depend_on_training(tables):
    done(make_jobs(tables)[0])
    longer = dataclasses.replace(tables, base=dataclasses.replace(tables.base, train=TrainConfig(steps=200)))
    assert missing([make_jobs(longer)[0]]) == []


@pytest.mark.parametrize("changes", [{"limit": 4}, {"tasks": ("pocket_unseen",)}, {"batch_tokens": 64}])
@pytest.mark.parametrize("number", [0, 2, -1], ids=["base", "lora", "agent"])
def test_other_settings_of_scoring_alone_score_again(tables, number, changes):
    done(make_jobs(tables)[number])
    parts = {
        part: dataclasses.replace(one, eval=dataclasses.replace(one.eval, **changes))
        for part, one in (("base", tables.base), ("agent", tables.agent))
    }
    job = make_jobs(dataclasses.replace(tables, **parts))[number]
    job.config.directory.joinpath("config.json").write_text(json.dumps(to_json(make_jobs(tables)[number].config)))
    assert missing([job]) == outdated([job]) == [job]
    assert gather([job])["facts"] == {}
    done(job)
    assert missing([job]) == outdated([job]) == []


def test_results_depend_on_the_content_of_the_users_files(tables, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n')
    data = dataclasses.replace(tables.base.data, files=(rows,))
    tables = dataclasses.replace(tables, base=dataclasses.replace(tables.base, data=data))
    base, lora = (job for job in make_jobs(tables) if job.name in ("base/0", "lora/0"))
    done(base)
    done(lora)
    assert missing([base, lora]) == []
    rows.write_text('{"a": 12}\n')
    assert missing([base]) == [base]
    with raises(CheckpointError, "--workdir", "data.files", "rows.jsonl", code="another config"):
        missing([lora])
    rows.unlink()
    with raises(DataError, "data.files", rows, code="unreadable"):
        missing([base])


def test_other_data_of_a_reasoning_task_is_noticed(tables, tmp_path):
    data, _ = tmp_path / "data", (tmp_path / "data" / "piqa" / "nested").mkdir(parents=True)
    rows = data / "piqa" / "nested" / "dev.jsonl"
    rows.write_text("1\n")

    def jobs(directory):
        base = dataclasses.replace(
            tables.base,
            data=dataclasses.replace(tables.base.data, dir=directory),
            eval=dataclasses.replace(tables.base.eval, tasks=("piqa",)),
        )
        return {job.name: job for job in make_jobs(dataclasses.replace(tables, base=base))}

    base, lora = jobs(data)["base/1"], jobs(data)["lora/1"]
    done(base)
    done(lora)
    data.rename(tmp_path / "moved")
    moved = jobs(tmp_path / "moved")
    assert missing([moved["base/1"], moved["lora/1"]]) == []
    (tmp_path / "moved" / "piqa" / "nested" / "dev.jsonl").write_text("2\n")
    assert missing([moved["base/1"]]) == [moved["base/1"]]
    with raises(CheckpointError, "--workdir", "data.dir", "piqa", code="another config"):
        missing([moved["lora/1"]])


def test_a_directory_of_files_is_its_content(tables, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text("1\n")
    first = content_digest(folder)
    (folder / "notes.txt").write_text("no rows\n")
    assert content_digest(folder) == first
    (folder / "b.jsonl").write_text("1\n")
    assert content_digest(folder) != first


def test_another_agent_table_is_noticed(tables):
    before = dataclasses.replace(tables, agent_methods=("lora", "lora_gen"))
    done(make_jobs(before)[-1])
    assert missing(make_jobs(before)[-1:]) == []
    # Fewer rows need nothing new; more of them are scored.
    fewer = make_jobs(dataclasses.replace(tables, agent_methods=("lora",)))[-1:]
    assert missing(fewer) == []
    assert gather(fewer)["agent"] == {"1": {"lora": {}}}
    assert [job.name for job in missing(make_jobs(tables)[-1:])] == ["agent/1"]
    with raises(CheckpointError, "--workdir", "agent_rows: 96 -> 48", code="another config"):
        missing(make_jobs(dataclasses.replace(before, agent_rows=48))[-1:])


def test_results_of_an_older_version_noted_less(tables):
    jobs = make_jobs(tables)
    for job in (jobs[0], jobs[2], jobs[-1]):
        done(job)
        values = json.loads(job.result.read_text())
        del values["inputs"]
        job.result.write_text(json.dumps(values))
        assert missing([job]) == []


def test_means_that_an_older_version_did_not_write_are_those_of_its_tasks(tables):
    job = make_jobs(tables)[2]
    scores = {"tasks": {"a": {"acc": 0.2}, "b": {"acc": 0.4}, "c": {"acc": 0.8}}, "ave_unseen": 0.61}
    seen = {"a": True, "b": False, "c": False}
    done(job, shots={str(n): dict.fromkeys(job.methods(n), scores) for n in job.shots}, seen=seen)
    found = gather([job])["runs"][job.run]["0"]["5"]
    assert found["har_unseen"] == pytest.approx(2 / (1 / 0.4 + 1 / 0.8))
    assert found["ave_unseen"] == 0.61


def test_a_begun_run_of_other_settings_names_the_field(tables):
    job = make_jobs(tables)[2]
    job.config.directory.mkdir(parents=True)
    begun = dataclasses.replace(job.config, train=TrainConfig(steps=7))
    (job.config.directory / "config.json").write_text(json.dumps(to_json(begun)))
    with raises(CheckpointError, "--workdir", "train.steps: 7 -> 100", code="another config"):
        missing([job])


def test_gathered_by_row_seed_and_shots(tables):
    jobs = make_jobs(tables)
    for job in jobs:
        if job.run != "experts_4":
            done(
                job,
                **({"agent": {"lora": {}}} if job.run == "agent" else {}),
                **({"versions": {"jax": "2"}} if job.run == "lora" else {}),
            )
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
    assert (found["shots"], found["seeds"]) == ("5", ["0", "1"])
    assert found["machines"] == [{"machine": {"cpus": 2}, "runs": ["base", "lora", "lora_gen", "agent"]}]
    assert found["versions"] == [
        {"versions": {"jax": "1"}, "runs": ["base", "lora_gen", "agent"]},
        {"versions": {"jax": "2"}, "runs": ["lora"]},
    ]
    assert jobs[0].result.name == RESULT
