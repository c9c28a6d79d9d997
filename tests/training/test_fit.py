"""Remat "fit": names are chosen from what a device's memory leaves, and nothing changes where it does not say."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from lora_gen_jax.config import Config, DataConfig, GeneratorConfig, MeshConfig, ModelConfig
from lora_gen_jax.decoder.pretrained.shapes import KNOWN_SHAPES
from lora_gen_jax.lab.tpu.programs import batch_shapes, shapes_pair
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training.fit import RESERVED, device_memory, fitted, needed_bytes

SHAPE = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def _settings_of_a_user():
    """JAX's defaults: shapes alone are made, of programs in bf16 that a TPU would run."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def config(monkeypatch) -> Config:
    monkeypatch.setitem(KNOWN_SHAPES, "middle", SHAPE)
    model = ModelConfig("middle", dtype="bfloat16", remat="fit")
    return Config(
        cloud=model,
        edge=model,
        mesh=MeshConfig(data=1, fsdp=4),
        generator=GeneratorConfig(rank=4, cloud_rank=4),
        data=DataConfig(prompts_per_step=8, cloud_length=256, edge_length=256, response_slots=64),
    )


def chosen(config, memory):
    pair, mesh = shapes_pair(config), make_mesh(1, 4, 1)
    batch = batch_shapes(config, pair.edge.config.num_layers)
    needed = needed_bytes(config, pair, mesh, batch)
    pair, line = fitted(config, pair, mesh, batch, lambda: None if memory is None else memory(needed))
    return pair.cloud.decoder.remat, pair.edge.decoder.remat, line


def test_a_cpu_does_not_say_its_memory_and_keeps_everything(config):
    assert device_memory() is None
    assert chosen(config, None) == ("fit", "fit", None)


class Device:
    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return self.limit and {"bytes_limit": self.limit}


def test_the_least_memory_of_all_processes_counts(monkeypatch):
    """Processes that chose apart would run different programs, and wait for each other forever."""
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5 << 30), Device(4 << 30)])
    assert device_memory() == 4 << 30
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for other, expected in ((3 << 10, 3 << 30), (9 << 10, 4 << 30), (0, None)):
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda x, other=other: np.array([x, other]))
        assert device_memory() == expected


def test_more_memory_keeps_more(config):
    everything = ("q", "k", "v", "o", "gate", "up", "attention")
    cloud, edge, line = chosen(config, lambda needed: 100 * needed)
    assert (cloud, edge) == (everything, everything)
    assert "gate" in line
    assert chosen(config, lambda needed: needed)[:2] == ((), ())
    # 512 tokens a device, 3 layers, 512 outputs in bf16: room for what one of four wide linear layers gave.
    room = 512 * 3 * 512 * 2
    cloud, edge, _ = chosen(config, lambda needed: (needed + room) / (1 - RESERVED))
    assert 0 < len(cloud) + len(edge) < 2 * len(everything)


def test_a_model_without_fit_and_a_cloud_that_is_not_trained(config):
    full = dataclasses.replace(config, edge=dataclasses.replace(config.edge, remat="full"))
    assert chosen(full, lambda needed: 100 * needed)[1] == "full"
    frozen = dataclasses.replace(config, generator=dataclasses.replace(config.generator, train_cloud=False))
    assert chosen(frozen, lambda needed: 1.2 * needed)[1] != ()
