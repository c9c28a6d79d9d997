"""One job done for real."""

import json

import pytest

from lora_gen_jax.evaluation import choices
from lora_gen_jax.lab.tables import run
from lora_gen_jax.lab.tables.jobs import make_jobs
from lora_gen_jax.lab.tables.spec import read_tables


def test_jobs_are_really_done(path, monkeypatch):
    monkeypatch.setattr(choices, "latency", lambda *args: 1.0)
    tables = read_tables(path)
    jobs = {job.name: job for job in make_jobs(tables)}
    for name in ("base/1", "lora/1"):
        run.do(jobs[name])
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
