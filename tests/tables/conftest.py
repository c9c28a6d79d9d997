"""Tables for tests: settings alone, and a config file on a tiny pair that can be trained."""

import dataclasses
import json

import pytest
from helpers import experiment

from lora_gen_jax.config import Config, EvalConfig, TrainConfig
from lora_gen_jax.config_file import to_json
from lora_gen_jax.tables.spec import Tables


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
    from lora_gen_jax.config_file import to_json

    config = experiment(root, tmp_path / "run", steps=2, validation_batches=0)
    (tmp_path / "base.json").write_text(json.dumps(to_json(config)))
    (tmp_path / "few.py").write_text(TEXT)
    return tmp_path / "few.py"
