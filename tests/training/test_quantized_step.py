"""A training step over quantized weights is that of the weights they stand for, on one device and on several."""

import helpers
import jax
import numpy as np
import pytest
from helpers import CLOUD, EDGE, SAME, generator_variables, random_params

from lora_gen_jax.config import Config, DataConfig, TrainConfig
from lora_gen_jax.data.pipeline import Group, pack_groups
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.quantized import dequantize, quantize_layers
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.models import init_params
from lora_gen_jax.sharding import make_mesh, param_shardings, spec
from lora_gen_jax.training.step import objective

pytestmark = pytest.mark.float64
DATA = DataConfig(
    prompts_per_step=4, prompts_per_row=2, cloud_length=32, edge_length=24, response_slots=8, query_length=12
)
CONFIG = Config(generator=helpers.SETTINGS, data=DATA, train=TrainConfig(steps=10))
MODELS = {"cloud": CLOUD, "edge": EDGE}
# The cloud's in one format, the edge's in the other.
PAIRS = {"int8, nf4": {"cloud": "int8", "edge": "nf4"}, "nf4, int8": {"cloud": "nf4", "edge": "int8"}}


def _batch():
    rng = np.random.default_rng(0)
    queries = [[tuple(rng.integers(2, 53, n).tolist() for n in pair) for pair in ((3, 2), (4, 3))] for _ in range(4)]
    groups = [Group("", (), rng.integers(2, 53, 5 + i).tolist(), each) for i, each in enumerate(queries)]
    return pack_groups(groups, DATA, EDGE.num_layers)


BATCH, GENERATOR = _batch(), LoRAGen(Decoder(CLOUD), EDGE, CONFIG.generator)


def _gradient(frozen, variables, batch):
    loss_fn = objective(GENERATOR, Decoder(EDGE), CONFIG)

    @jax.jit
    def gradient(params, stats, frozen, batch):
        return jax.value_and_grad(lambda p: loss_fn(p, stats, frozen, batch, jax.random.key(0)), has_aux=True)(params)

    (loss, _), gradients = gradient(variables["params"], variables["batch_stats"], frozen, batch)
    return loss, gradients


@pytest.fixture(scope="module", params=list(PAIRS))
def made(request):
    """(formats, frozen weights, variables, (loss, gradients) on one device)."""
    formats = PAIRS[request.param]
    frozen = {name: quantize_layers(random_params(MODELS[name], seed=2), format) for name, format in formats.items()}
    variables = generator_variables(GENERATOR, frozen["cloud"], BATCH.prompts)
    return formats, frozen, variables, _gradient(frozen, variables, BATCH)


def _floats(node):
    if not isinstance(node, dict):
        return node
    rest = {key: _floats(value) for key, value in node.items() if key != "scales"}
    return rest | ({"kernel": dequantize(node["kernel"], node["scales"], float)} if "scales" in node else {})


def _same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), found, expected)


def test_the_gradient_is_that_of_the_weights_it_stands_for(made):
    _, frozen, variables, (loss, gradients) = made
    # `dequantize` rounds int8's product of code and scale to float32, which the step itself does not.
    near = {"rtol": 1e-5, "atol": 1e-7}
    found, expected = (loss, gradients), _gradient(_floats(frozen), variables, BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **near), found, expected)
    assert all(np.max(np.abs(x)) > 1e-6 for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("sizes", [(1, 2, 2), (1, 4, 1)], ids=str)
def test_on_several_devices_it_is_the_same(made, sizes):
    formats, frozen, variables, alone = made
    mesh = make_mesh(*sizes)
    placed = {}
    for name, format in formats.items():
        decoder = Decoder(MODELS[name])
        shardings = param_shardings(mesh, lambda decoder=decoder, format=format: init_params(decoder, weights=format))
        placed[name] = jax.device_put(frozen[name], shardings)
    assert not placed["edge"]["layers"]["ffn"]["down"]["kernel"].sharding.is_fully_replicated
    batch = jax.device_put(BATCH, jax.sharding.NamedSharding(mesh, spec("batch")) if sizes == (1, 2, 2) else None)
    with jax.set_mesh(mesh):
        _same(_gradient(placed, variables, batch), alone)
