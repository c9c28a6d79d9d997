"""Inference with weights on a mesh of several devices gives what it gives on one."""

import jax
import numpy as np
import pytest
from helpers import SAME, raises
from inference_models import make_gates

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.prefix import encode_prefix
from lora_gen_jax.inference.rows import Request
from lora_gen_jax.inference.scoring import score
from lora_gen_jax.models import init_params
from lora_gen_jax.placement import mesh_of, padded_rows, place_rows
from lora_gen_jax.sharding import make_mesh, param_shardings

pytestmark = pytest.mark.float64
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [3] * 7, [8]]
REQUESTS = [Request([1, 2, 3], [[4, 5], [6]]), Request([9], [[2]]), Request([7] * 9, [[1, 2, 3]])]


@pytest.fixture(params=[(4, 1), (2, 2)])
def placed(request, llama):
    """The weights on four devices: copies for the rows, or halves of each."""
    mesh = make_mesh(*request.param)
    return jax.device_put(llama.params, param_shardings(mesh, lambda: init_params(llama.decoder)))


def test_texts_are_those_of_one_device(llama, placed):
    for adapter in (None, make_gates(llama.decoder.config, 5)):
        want = generate(llama.edge(adapter), PROMPTS, GenerationSettings(max_new_tokens=6))
        got = generate(EdgeModel(llama.decoder, placed, adapter=adapter), PROMPTS, GenerationSettings(max_new_tokens=6))
        assert [one.ids for one in got] == [one.ids for one in want]
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, **SAME)


@pytest.mark.parametrize("ids", [None, [5, 6, 7, 8]])
def test_scores_are_those_of_one_device(llama, placed, ids):
    def scores(params):
        prefix = None if ids is None else encode_prefix(EdgeModel(llama.decoder, params), ids)
        return score(EdgeModel(llama.decoder, params, prefix=prefix), REQUESTS, batch_tokens=64)

    for a, b in zip(scores(placed), scores(llama.params), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, **SAME)
        assert a.is_greedy == b.is_greedy


def test_rows_divide_among_the_devices(llama, placed):
    assert mesh_of(llama.params) is None
    assert [padded_rows(n, llama.params) for n in (1, 3, 5)] == [1, 4, 8]
    assert [padded_rows(n, placed) for n in (1, 3, 5)] == [4, 4, 8]
    tokens = place_rows(np.zeros((4, 3), np.int32), placed)
    assert tokens.sharding.shard_shape(tokens.shape) == (1, 3)
    assert isinstance(place_rows(np.zeros((4, 3)), llama.params), np.ndarray)


def test_a_mesh_with_other_axes_is_named(llama):
    mesh = jax.make_mesh((4,), ("batch",), devices=jax.devices()[:4])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with raises(ConfigError, "mesh", "axes batch", "data, fsdp, model", "lora_gen_jax.sharding.make_mesh"):
        generate(
            EdgeModel(llama.decoder, jax.device_put(llama.params, everywhere)),
            PROMPTS,
            GenerationSettings(max_new_tokens=2),
        )
