"""Multi-task LoRA: the equation, merged and beside the weights, and what it is blind to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EDGE, OPT, SAME, SETTINGS, filled, logits, random_params, token_rows

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.methods.lora import MultiTaskLoRA

pytestmark = pytest.mark.float64
TOKENS = np.array(token_rows([7, 7], EDGE.vocab_size), np.int32)


def made(config, settings=SETTINGS):
    module = MultiTaskLoRA(config, settings)
    shapes = jax.eval_shape(module.init, jax.random.key(0), None, None)
    params = filled(shapes["params"], 3)
    return params, module.apply({"params": params}, None, None)


@pytest.mark.parametrize("config", [EDGE, OPT], ids=["llama", "opt"])
def test_merged_equals_the_side_path_and_changes_the_model(config):
    _, generated = made(config)
    base, decoder = random_params(config), Decoder(config)
    beside = logits(decoder, base, TOKENS, adapter=generated.adapter)
    np.testing.assert_allclose(logits(decoder, merge(base, generated.adapter), TOKENS), beside, **SAME)
    assert float(jnp.max(jnp.abs(beside - logits(decoder, base, TOKENS)))) > 0.1


def test_the_equation_by_hand():
    params, generated = made(EDGE)
    layer = jax.tree.map(lambda x: x[1], generated.adapter.scanned)
    delta = generated.adapter.replace(scanned=layer).weight_delta("q")
    a, b = np.asarray(params["q_a"][1]), np.asarray(params["q_b"][1])
    np.testing.assert_allclose(delta, SETTINGS.alpha / SETTINGS.rank * a @ b, **SAME)
    assert generated.gates is None


def test_the_sites_are_the_configs_and_start_at_the_base():
    settings = dataclasses.replace(SETTINGS, lora_sites=("q", "up"))
    module = MultiTaskLoRA(EDGE, settings)
    params = module.init(jax.random.key(0), None, None)["params"]
    assert sorted(params) == ["q_a", "q_b", "up_a", "up_b"]
    assert params["up_a"].shape == (EDGE.num_layers, EDGE.width, settings.rank)
    assert all(not np.any(params[name]) for name in ("q_b", "up_b"))
    assert np.any(params["q_a"])
    # OPT's FFN has no gate; a config that names it for all families is no error.
    assert not any(name.startswith("gate") for name in made(OPT)[0])
