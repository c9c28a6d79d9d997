"""`lora-gen bench`: what it says of a step, on one device and on several, and that the step is counted as it is."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import experiment, raises

from lora_gen_jax.data.pipeline import Shard, build_batch
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.inference.cost import count
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import load_pair
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training import bench as module
from lora_gen_jax.training.bench import bench
from lora_gen_jax.training.cost import method_cost
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.prepare import make_sampler, place, training_tasks
from lora_gen_jax.training.step import init_state, make_train_step


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    return experiment(root, root / "run")


def first_batch(config, pair):
    sampler = make_sampler(config, pair, training_tasks(config), "train")
    assert sampler is not None
    return build_batch(sampler, (config.train.seed, 0), Shard())


@pytest.mark.parametrize("method", ["lora_gen", "lora", "lora_moe", "mixlora"])
def test_a_step_is_counted_as_it_is(config, method):
    # Layers one by one: the body of a loop would be counted once.
    model = dataclasses.replace(config.edge, unroll=16)
    config = dataclasses.replace(config, cloud=model, edge=model, method=method)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    pair = load_pair(config, mesh)
    host = first_batch(config, pair)
    generator, optimizer = make_generator(config, pair), make_optimizer(config.train)
    with jax.set_mesh(mesh):
        batch = place(host, mesh)
        state = init_state(generator, optimizer, pair.frozen, batch, 0)
        counted = count(
            make_train_step(generator, pair.edge.decoder, optimizer, config).lower(state, pair.frozen, batch)
        )
    said = method_cost(config, pair.cloud.config, pair.edge.config, host)
    # What weighs experts is not counted; it grows with the experts and not, as the rest, with the width of 32.
    assert said.total <= counted.matmuls <= 1.04 * said.total


def test_what_it_prints(config, capsys, monkeypatch):
    monkeypatch.setattr(module, "matmul_rate", lambda dtype: 1e9)
    pair = load_pair(config)
    host = first_batch(config, pair)
    found = bench(config)
    said = capsys.readouterr().out
    cost = method_cost(config, pair.cloud.config, pair.edge.config, host)
    assert found["gmacs"] == cost.total / 1e9
    # Four devices of a CPU are the same cores.
    assert found["matmul_gmacs_per_second"] == 1
    assert found["share"] == pytest.approx(cost.total / 1e9 / found["seconds"])
    assert found["edge_fill"] == np.mean(host.positions_PT >= 0)
    assert "GMAC/s in float32, 4 device(s)" in said
    assert f"share        {100 * found['share']:.0f} % of the matmul rate" in said


def test_a_batch_that_the_devices_cannot_share_and_a_step_that_is_not_counted(config):
    data = dataclasses.replace(config.data, prompts_per_step=6)
    with raises(ConfigError, "data.prompts_per_step", "3 rows", "4 devices"):
        bench(dataclasses.replace(config, data=data))
    with raises(ConfigError, "method", "autocompressor"):
        bench(dataclasses.replace(config, method="autocompressor"))
