"""The list of methods, and that they train by the same step, on one device and on a mesh of four."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest
from helpers import CLOUD, EDGE, SAME, raises, random_params

import lora_gen_jax.decoder
from lora_gen_jax.config import CompressorConfig, Config, DataConfig, HubConfig, TrainConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.data.pipeline import Group, pack_groups
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.methods.registry import METHODS, make_generator, trained_methods
from lora_gen_jax.models import Model, Pair
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.prepare import place
from lora_gen_jax.training.step import init_state, make_train_step

pytestmark = pytest.mark.float64
# Three AdamW steps at 1e-2: it divides by √v + 1e-8, so that where a gradient is zero but for the rounding of float64,
# of 1e-15 in a sum of a few hundred terms, a step moves a parameter by up to 1e-2·1e-15/1e-8.
CLOSE = 3 * 1e-2 * 1e-15 / 1e-8
ROOT = Path(__file__).parents[1]
DATA = DataConfig(
    prompts_per_step=4,
    prompts_per_row=1,
    cloud_length=16,
    edge_length=24,
    response_slots=8,
    query_length=12,
    edge_prompt_length=12,
)
CONFIG = Config(
    generator=dataclasses.replace(helpers.SETTINGS, balance_coefficient=0.1),
    hub=HubConfig(modules=3),
    compressor=CompressorConfig(summary_tokens=2, segments=2),
    data=DATA,
    train=TrainConfig(steps=10, warmup_steps=1, learning_rate=1e-2),
)


def _pair() -> Pair:
    encoder = SimpleNamespace(end=1, line_break=5)
    models = [(CLOUD, 2), (EDGE, 3)]
    return Pair(*(Model(Decoder(c), random_params(c, seed), encoder, "") for c, seed in models))  # pyright: ignore


def _batch():
    rng, groups = np.random.default_rng(0), []
    for task, lengths in enumerate(([(3, 2), (5, 1)], [(4, 3)], [(2, 1), (6, 2), (3, 3)], [(7, 2), (1, 1)])):
        queries = [tuple(rng.integers(2, 53, n).tolist() for n in pair) for pair in lengths]
        prompt = rng.integers(2, 53, int(rng.integers(4, 12))).tolist()
        groups.append(Group("", (), prompt, queries, task=task % 3, knowledge=task % 2 == 1, edge_prompt=prompt[::-1]))
    return pack_groups(groups, DATA, EDGE.num_layers)


def _three_steps(method, pair, mesh):
    config = check(dataclasses.replace(CONFIG, method=method))
    module, optimizer, batch = make_generator(config, pair), make_optimizer(config.train), place(_batch(), mesh)
    with jax.set_mesh(mesh):
        state = init_state(module, optimizer, pair.frozen, batch, seed=0)
        step, metrics = make_train_step(module, pair.edge.decoder, optimizer, config), []
        for _ in range(3):
            state, measured = step(state, pair.frozen, batch)
            metrics.append(jax.device_get(measured))
    return jax.device_get(state.params), metrics


@pytest.mark.parametrize("method", sorted(set(trained_methods()) - {"lora", "lora_gen"}))  # these two: tests/training
def test_every_method_trains_by_the_same_step_on_any_mesh(method):
    pair, devices = _pair(), jax.devices()
    one, metrics = _three_steps(method, pair, make_mesh(devices=devices[:1]))
    assert [float(m["loss"]) for m in metrics] == sorted((float(m["loss"]) for m in metrics), reverse=True)
    if method in ("lora_moe", "mixlora"):
        assert all(m["balance"] > 0 for m in metrics)
    if method == "autocompressor":
        assert metrics[2]["segment_loss"] < metrics[0]["segment_loss"]
    several, again = _three_steps(method, pair, make_mesh(data=2, model=2, devices=devices))
    for name in metrics[0]:
        want, got = ([float(m[name]) for m in found] for found in (metrics, again))
        # A gradient's norm follows the parameters by the loss's curvature, which is below 100 here.
        np.testing.assert_allclose(got, want, rtol=100 * CLOSE, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE), one, several)


@pytest.mark.parametrize("method", trained_methods())
def test_no_method_mixes_types_in_the_numbers_that_users_compute_with(method):
    """Traced, not compiled: strict promotion refuses a bfloat16 that would become float32 unnoticed, or the reverse."""
    config, mesh = check(dataclasses.replace(CONFIG, method=method)), make_mesh(devices=jax.devices()[:1])
    with jax.enable_x64(False), jax.numpy_dtype_promotion("strict"), jax.set_mesh(mesh):
        pair = _pair()
        module, optimizer = make_generator(config, pair), make_optimizer(config.train)
        state = jax.eval_shape(lambda: init_state(module, optimizer, pair.frozen, _batch(), seed=0))
        step = make_train_step(module, pair.edge.decoder, optimizer, config)
        after, _ = jax.eval_shape(step, state, pair.frozen, _batch())
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_keys_and_titles():
    trained = ("lora", "lora_moe", "mixlora", "lorahub", "autocompressor", "lora_gen")
    steps = ("refined", "refined_lora", "refined_both", "equal_refined", "shots_lora")
    assert tuple(METHODS) == ("base", "icl", "task_vector", *trained, *steps)
    assert trained == tuple(trained_methods())
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


def test_what_is_not_trained_is_no_method_of_a_config():
    for key in ("icl", "ptuning"):
        with raises(ConfigError, "method", repr(key), "lora, lora_moe"):
            check(dataclasses.replace(CONFIG, method=key))


def test_the_decoder_names_no_method():
    titles = {method.title for method in METHODS.values()}
    names = "|".join(
        sorted({*METHODS, *titles, "MoE", "hub_search", "GatedPool", "LoRA"} - {"base", "icl"}, key=len)[::-1]
    )
    paths = sorted(Path(lora_gen_jax.decoder.__file__).parent.rglob("*.py"))
    assert len(paths) > 10
    for path in paths:
        text = re.sub(r"(import|from) lora_gen_jax\S*|lora_gen_jax[.`/]\S*", "", path.read_text(encoding="utf-8"))
        assert not re.findall(rf"(?i)\b({names})\b", text), path


def test_the_method_of_the_contributors_guide(monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    made: dict = {"__name__": "scales"}
    exec(compile(code.group(1), "CONTRIBUTING.md", "exec"), made)
    monkeypatch.setitem(METHODS, "scales", made["METHOD"])
    pair = _pair()
    params, metrics = _three_steps("scales", pair, make_mesh(devices=jax.devices()[:1]))
    assert metrics[2]["loss"] < metrics[0]["loss"]
    assert set(params) == {"gate", "up", "down"}
    # Scaling the outputs is scaling the columns of the weights.
    scaled = jax.tree.map(lambda x: x, pair.edge.params)
    for site, scale_LF in params.items():
        scaled["layers"]["ffn"][site]["kernel"] = scaled["layers"]["ffn"][site]["kernel"] * (1 + scale_LF[:, None])
    tokens = np.arange(10, dtype=np.int32)[None]
    adapter = made["Scales"](params)
    got, _ = jax.jit(lambda p: pair.edge.decoder.apply({"params": p}, tokens, adapter=adapter))(pair.edge.params)
    want, _ = jax.jit(lambda p: pair.edge.decoder.apply({"params": p}, tokens))(scaled)
    np.testing.assert_allclose(got, want, **SAME)
