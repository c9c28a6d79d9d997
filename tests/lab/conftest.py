"""Tables for tests: settings alone, a config file on a tiny pair that can be trained, and jobs that end at once."""

import dataclasses
import json

import pytest
from helpers import experiment

from lora_gen_jax.config import Config, EvalConfig, TrainConfig
from lora_gen_jax.config_file import to_json
from lora_gen_jax.lab.tables import command, latency
from lora_gen_jax.lab.tables.jobs import write_result
from lora_gen_jax.lab.tables.spec import Tables

TEXT = """
import dataclasses
import json
from pathlib import Path

from lora_gen_jax.config_file import from_json
from lora_gen_jax.lab.tables.spec import Tables


def get_tables():
    base = from_json(json.loads(Path(__file__).with_name("base.json").read_text()))
    agent = dataclasses.replace(base, name="")
    return Tables(base, {"lora": {"method": "lora"}, "lora_gen": {}}, agent, seeds=(0, 1), shots=(1, 2))
"""


@pytest.fixture
def tables(tmp_path):
    base = Config(name="few", workdir=tmp_path, train=TrainConfig(steps=100), eval=EvalConfig(limit=3))
    agent = dataclasses.replace(base, name="agent", train=TrainConfig(steps=400))
    runs = {"lora": {"method": "lora"}, "lora_gen": {}, "experts_4": {"generator": {"num_experts": 4}}}
    return Tables(base, runs, agent, seeds=(0, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.fixture
def path(root, tmp_path):
    """A config file on a tiny pair."""
    config = experiment(root, tmp_path / "run", steps=2, validation_batches=0)
    (tmp_path / "base.json").write_text(json.dumps(to_json(config)))
    (tmp_path / "few.py").write_text(TEXT)
    return tmp_path / "few.py"


@pytest.fixture
def started(monkeypatch):
    """Commands that would have been started; each job leaves a result at once, unless its name is in "broken"."""
    found = {"commands": [], "broken": set()}

    def run_jobs(jobs, make_command):
        for job in jobs:
            found["commands"].append(make_command(job))
            if job.name not in found["broken"]:
                write_result(job, fake_values(job))
        return [job for job in jobs if job.name in found["broken"]]

    monkeypatch.setattr(command, "run_jobs", run_jobs)
    monkeypatch.setattr(latency, "measure_costs", lambda tables, rows: {"answers": {}, "workload": {}, "rows": rows})
    monkeypatch.setattr("lora_gen_jax.lab.tables.layout.table_13", lambda results, costs: None)
    return found


def fake_values(job):
    accuracy = 0.5 + 0.1 * job.seed
    tasks = {"warm": {"acc": accuracy, "n": 4, "context_tokens": 3.0}}
    scores = {"tasks": tasks, "groups": {"seen": {"accuracy": accuracy}}, "ave": accuracy, "har": accuracy}
    scores |= {"ave_seen": accuracy, "ave_unseen": None}
    shots = {str(n): dict.fromkeys(job.methods(n), scores) for n in job.shots}
    known = {"steps": job.config.train.steps, "machine": {"device": "d", "cpus": 2, "system": "s"}, "versions": {}}
    return {"shots": shots, "seen": {"warm": True}, "agent": {key: {} for key in job.agent_methods}, **known}
