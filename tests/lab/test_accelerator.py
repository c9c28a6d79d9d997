"""`benchmarks/accelerator.py` where there is no accelerator: every measurement runs, on the same code paths."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import raises

from lora_gen_jax.decoder.pretrained.shapes import KNOWN_SHAPES
from lora_gen_jax.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accelerator.py"
SHAPE = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
CONFIG = """
from lora_gen_jax.config import Config, DataConfig, GeneratorConfig, MeshConfig, ModelConfig

def get_config():
    return Config(
        cloud=ModelConfig("small-cloud"),
        edge=ModelConfig("small-edge"),
        mesh=MeshConfig(data=-1, fsdp=16),
        generator=GeneratorConfig(num_experts=4, top_k=2, rank=2, dropout=0.0, cloud_rank=2),
        data=DataConfig(
            prompts_per_step=4, queries_per_prompt=2, cloud_length=32, edge_length=32, query_length=32, response_slots=8
        ),
    )
"""
# Each program, with float weights or with codes.
ONCE = ("train_step int8", "specialise bfloat16", "prefill int8", "decode", "attention", "product", "logits")
SIZES = ("--repeats", "2", "--rows", "1", "--mixed-rows", "2", "--input-tokens", "8", "--cache-slots", "16")
FLAGS = (*SIZES, "--devices", "1")


@pytest.fixture(scope="module")
def accelerator():
    spec = importlib.util.spec_from_file_location("accelerator", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["accelerator"] = module
    with (
        jax.default_matmul_precision("default"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        spec.loader.exec_module(module)
        yield module
    del sys.modules["accelerator"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KNOWN_SHAPES, "small-edge", SHAPE)
        patch.setitem(KNOWN_SHAPES, "small-cloud", SHAPE | {"num_hidden_layers": 3})
        path = tmp_path_factory.mktemp("config") / "small.py"
        path.write_text(CONFIG)
        yield str(path)


@pytest.fixture(scope="module")
def record(accelerator, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("accelerator")
    accelerator.main([config, "--out", str(out), *FLAGS, "--only", ",".join(ONCE)])
    assert "| train_step int8 |" in (out / "accelerator.md").read_text()
    return json.loads((out / "accelerator.json").read_text())


def test_all_is_measured(record):
    results = record["results"]
    assert [name for name, found in results.items() if "failed" in found] == []
    programs = {*ONCE[:3], "decode bfloat16", "decode int8", "decode as many rows as mixed", "decode mixed"}
    assert programs < set(results)
    for name in programs:
        found = results[name]
        assert found["fastest"] <= found["seconds"] <= found["slowest"]
        assert found["share_of_matmul"] > 0
        assert found["memory_gb"] > 0
    # 4 prompts of 32 cloud slots, 32 edge slots each.
    step = results["train_step int8"]
    assert step["tokens_per_second"] * step["seconds"] == pytest.approx(4 * 64)


def test_errors_are_those_of_the_arithmetic(record):
    """In float32 two orders of the same sums differ by a few epsilon; codes of 8 and 4 bits by half a step."""
    results, epsilon = record["results"], float(np.finfo(np.float32).eps)
    # Sums of at most 128 terms.
    for name in ("attention grouped", "attention xla"):
        assert results[name]["error"] < 128 * epsilon
        assert results[name]["gradient_error"] < 128 * epsilon
    assert results["logits"]["error"] < 128 * epsilon
    assert results["product bfloat16"]["error"] < 128 * epsilon
    for weights in ("int8", "nf4"):
        assert results[f"product {weights}"]["kernel_error"] < 128 * epsilon
    # 128 normal weights: the largest lies near 2.6 of them, a step is that over 127, and the rounding error of uniform
    # steps is their width over the root of 12; within a factor of two, since the largest weight is random.
    assert 2.6 / 127 / 12**0.5 / 2 < results["product int8"]["error"] < 2.6 / 127 / 12**0.5 * 2
    assert results["product int8"]["error"] < results["product nf4"]["error"]


def test_a_batch_has_no_padding_and_fits_the_models(accelerator, config):
    from lora_gen_jax.config_file import read_config

    made = read_config(Path(config))
    pair = accelerator.programs.shapes_pair(made, "cpu")
    batch = accelerator.full_batch(made, pair)
    assert (batch.positions_PT >= 0).all()
    assert (batch.prompts.positions_BT >= 0).all()
    assert batch.weight_PS.all()
    assert set(np.unique(batch.segments_PT)) == {1, 2}
    shapes = accelerator.programs.batch_shapes(made, 2)
    assert jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, shapes)


def test_a_failure_is_noted_and_the_next_measurement_runs(accelerator, config, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise MemoryError("RESOURCE_EXHAUSTED: 3 GB\nmore")

    monkeypatch.setattr(accelerator.Runner, "program", full)
    accelerator.main([config, "--out", str(tmp_path), *FLAGS, "--only", "decode int8,product int8"])
    results = json.loads((tmp_path / "accelerator.json").read_text())["results"]
    assert results["decode int8"] == {"failed": "MemoryError: RESOURCE_EXHAUSTED: 3 GB"}
    assert results["product int8"]["seconds"] > 0


def test_all_devices_take_part_unless_fewer_are_asked_for(accelerator, config, tmp_path):
    accelerator.main([config, "--out", str(tmp_path), *SIZES, "--only", "decode bfloat16"])
    record = json.loads((tmp_path / "accelerator.json").read_text())
    assert record["devices"] == jax.device_count() > 1
    assert [name for name, found in record["results"].items() if "failed" in found] == []


def test_bad_flags_are_named(accelerator, config, tmp_path):
    with raises(ConfigError, "--out"):
        accelerator.main([config])
    with raises(ConfigError, "--weights"):
        accelerator.main([config, "--out", str(tmp_path), "--weights", "int3"])
