"""Logical axes, constraints inside compiled programs, and meshes over one slice or several."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOUD, EDGE, SAME, SETTINGS, generator_variables, prompts_of, raises, random_params
from jax.sharding import PartitionSpec as P

from lora_gen_jax import sharding
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.models import init_params
from lora_gen_jax.sharding import constrain, divided_spec, make_mesh, mesh_size, param_shardings, spec

pytestmark = pytest.mark.float64


def test_a_misspelt_axis_is_an_error_with_and_without_a_mesh():
    with raises(ConfigError, "emebd", "'emebd'", "batch"):
        spec("emebd")
    with raises(ConfigError, "hedas", "'hedas'"):
        constrain(jnp.zeros((2, 2)), "batch", "hedas")
    with jax.set_mesh(make_mesh(2, 2)), raises(ConfigError, "hedas", "'hedas'"):
        jax.jit(lambda x: constrain(x, "batch", "hedas"))(jnp.zeros((4, 2)))


def test_a_constraint_splits_inside_a_program_and_is_nothing_without_a_mesh():
    x = jnp.arange(48.0).reshape(8, 6)
    double = jax.jit(lambda x: constrain(2 * x, "batch", "heads"))
    alone = double(x)
    assert len(alone.devices()) == 1
    with jax.set_mesh(make_mesh(1, 2, 2)):
        split = double(x)
        assert mesh_size("batch") == 2
        assert mesh_size("heads") == 2
    assert split.sharding.shard_shape(split.shape) == (4, 3)
    np.testing.assert_array_equal(split, alone)
    assert mesh_size("batch") == 1


def test_an_axis_that_does_not_divide_stays_whole():
    with jax.set_mesh(make_mesh(1, 2, 2)):
        assert divided_spec((8, 5), "batch", "heads") == P(("data", "fsdp"), None)
        assert divided_spec((3, 6), "batch", "heads") == P(None, "model")
        y = jax.jit(lambda x: constrain(x, "batch", "heads"))(jnp.zeros((3, 6)))
        assert y.sharding.shard_shape(y.shape) == (3, 3)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (4, 1, 1)), ((1, -1, 1), (1, 4, 1)), ((-1, 2, 2), (1, 2, 2)), ((2, 2, 1), (2, 2, 1))],
)
def test_one_size_takes_what_the_others_leave(sizes, shape):
    assert tuple(make_mesh(*sizes).shape.values()) == shape


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (2, 1, 1), (0, 1, 1), (-2, -2, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with raises(ConfigError, "mesh", f"data={sizes[0]}", "4 devices"):
        make_mesh(*sizes)


def two_slices(monkeypatch):
    """Eight stand-ins for devices of two slices, and how the library was asked to arrange them."""
    asked = {}

    def arrange(within, across, devices):
        asked.update(within=within, across=across)
        return np.array(devices).reshape([a * b for a, b in zip(within, across, strict=True)])

    monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", arrange)
    monkeypatch.setattr(sharding, "Mesh", lambda devices, axes, axis_types: SimpleNamespace(devices=devices, axes=axes))
    return [SimpleNamespace(slice_index=i // 4) for i in range(8)], asked


def test_slices_lie_along_the_data_axis(monkeypatch):
    devices, asked = two_slices(monkeypatch)
    mesh = make_mesh(-1, 2, 1, devices)
    assert asked == {"within": (2, 2, 1), "across": (2, 1, 1)}
    assert mesh.devices.shape == (4, 2, 1)
    with raises(ConfigError, "mesh.data", 1, "2 slices"):
        make_mesh(1, 8, 1, devices)


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 1), (1, 1, 4), (1, 2, 2)])
def test_a_decoder_on_a_mesh_gives_what_it_gives_on_one_device(sizes):
    params, decoder = random_params(EDGE), Decoder(EDGE)
    tokens = np.random.default_rng(0).integers(0, EDGE.vocab_size, (4, 8)).astype(np.int32)

    def logits(params):
        hidden, _ = decoder.apply({"params": params}, tokens)
        return decoder.apply({"params": params}, hidden, method="logits")

    mesh = make_mesh(*sizes)
    shardings = param_shardings(mesh, lambda: init_params(decoder))
    # Its 53 rows divide among no devices.
    assert shardings["embed"]["embedding"].shard_shape((53, 16)) == (53, 16 // sizes[1])
    with jax.set_mesh(mesh):
        got = jax.jit(logits)(jax.device_put(params, shardings))
    np.testing.assert_allclose(got, jax.jit(logits)(params), **SAME)


def test_specializing_on_a_mesh_gives_the_gates_of_one_device():
    frozen, prompts = random_params(CLOUD), [[5, 6, 7, 8], [9, 3], [4] * 9]
    generator = LoRAGen(Decoder(CLOUD), EDGE, SETTINGS)
    variables = generator_variables(generator, frozen, prompts_of([4], 1, 16))
    want = specialize(generator, variables, frozen, prompts)
    mesh = make_mesh(1, 4, 1)
    shardings = param_shardings(mesh, lambda: init_params(Decoder(CLOUD)))
    got = specialize(generator, variables, jax.device_put(frozen, shardings), prompts)
    np.testing.assert_allclose(got.gates.dense(), want.gates.dense(), **SAME)
