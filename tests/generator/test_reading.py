"""What the router reads besides meta tokens, heads by layer, signed gates and the reader's loss, in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOUD, EDGE, SAME, SETTINGS, generator_variables, prompts_of, random_params

from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.generator.cloud import CloudEncoder
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.generator.router import Router
from lora_gen_jax.training.reader import contrast, contrastive_loss, points

L = EDGE.num_layers
READING = dataclasses.replace(
    SETTINGS,
    routing="linear",
    router_input="pooled",
    pooled_layers=(1, 2),
    router_heads="per_layer",
    router_point=5,
    pool="per_layer",
    batch_norm_by_layer=True,
    standardize=True,
    cloud_rank=0,
    train_cloud=False,
)


@pytest.fixture(scope="module")
def frozen():
    return random_params(CLOUD, seed=2)


def test_pooled_states_are_the_prompts_mean_after_the_named_layers(frozen):
    """Against a decoder of one layer, and of all, whose last norm is undone by having none of its scale."""
    prompts = prompts_of([5, 3, 6, 2], 2, 16)
    settings = dataclasses.replace(SETTINGS, router_input="both", pooled_layers=(1,), cloud_rank=0)
    encoder = CloudEncoder(Decoder(CLOUD), L, settings)
    variables = encoder.init(jax.random.key(0), frozen, prompts)
    states_PLX = np.asarray(encoder.apply(variables, frozen, prompts))
    assert states_PLX.shape == (4, L, 2 * CLOUD.width)
    # The first layer alone: its output before the final norm is found by asking for the sum with weight one per token.
    one = Decoder(dataclasses.replace(CLOUD, num_layers=1))
    first = {**frozen, "layers": jax.tree.map(lambda x: x[:1], frozen["layers"])}
    x_BTC = one.apply({"params": first}, prompts.tokens_BT, method="embed")
    (_, _), collections = one.apply(
        {"params": first},
        x_BTC,
        prompts.positions_BT,
        segments_BT=prompts.segments_BT,
        pool_BMT=jnp.broadcast_to(jnp.eye(16)[None], (2, 16, 16)),
        mutable=["records"],
        method="encode",
    )
    tokens_BTC = np.asarray(jax.tree.leaves(collections["records"])[0][0])
    for p in range(4):
        row, place = divmod(p, 2)
        own = (prompts.segments_BT[row] == place + 1) & (prompts.meta_BT[row] < 0)
        expected = tokens_BTC[row][own].mean(axis=0)
        # Sums of at most six fp32 numbers of size one.
        np.testing.assert_allclose(
            states_PLX[p, 0, CLOUD.width :], expected, atol=6 * 2**-23 * np.abs(tokens_BTC).max()
        )
        np.testing.assert_array_equal(states_PLX[p, 0, CLOUD.width :], states_PLX[p, 1, CLOUD.width :])


def test_meta_tokens_and_pooled_states_are_the_same_together_and_alone(frozen):
    prompts = prompts_of([5, 3], 1, 24)
    variables = CloudEncoder(Decoder(CLOUD), L, SETTINGS).init(jax.random.key(0), frozen, prompts)

    def states(**settings):
        encoder = CloudEncoder(Decoder(CLOUD), L, dataclasses.replace(SETTINGS, **settings))
        return np.asarray(encoder.apply(variables, frozen, prompts))

    both = states(router_input="both", pooled_layers=(2, 1))
    np.testing.assert_array_equal(both[..., : CLOUD.width], states())
    pooled = states(router_input="pooled", pooled_layers=(2, 1))
    assert pooled.shape == (2, 1, 2 * CLOUD.width)
    np.testing.assert_array_equal(both[..., CLOUD.width :], np.repeat(pooled, L, axis=1))


def test_a_pooled_layer_that_does_not_exist_is_an_error(frozen):
    prompts = prompts_of([5], 1, 16)
    for layer in (0, CLOUD.num_layers + 1):
        encoder = CloudEncoder(
            Decoder(CLOUD), L, dataclasses.replace(SETTINGS, router_input="both", pooled_layers=(layer,))
        )
        with pytest.raises(ConfigError):
            encoder.init(jax.random.key(0), frozen, prompts)


@pytest.mark.parametrize("train_reader", [True, False])
def test_what_is_not_trained_gets_no_gradient(frozen, train_reader):
    module = LoRAGen(Decoder(CLOUD), EDGE, dataclasses.replace(READING, train_reader=train_reader))
    prompts = prompts_of([5, 4, 6], 1, 40)
    variables = generator_variables(module, frozen, prompts)

    def total(params):
        generated, _ = module.apply({**variables, "params": params}, frozen, prompts, True, mutable=["batch_stats"])
        return jnp.sum(generated.gates.weight**3)

    gradients = jax.grad(total)(variables["params"])
    assert not np.any(gradients["cloud"]["meta_embedding"])
    assert np.all(np.any(np.asarray(gradients["router"]["heads"]), axis=(1, 2)))
    for name in ("f1", "f2"):
        assert np.any(gradients["router"][name]) == train_reader


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("read_layers", [1, L])
def test_linear_routing_with_heads_and_standardized_input_in_numpy(read_layers):
    rng = np.random.default_rng(3)
    B, C, H, N, E = 5, 7, 4, 3, 6
    meta = 3 + 2 * rng.standard_normal((B, read_layers, C))
    router = Router(E, E, H, routing="linear", by_layer=True, heads=L, point=N, standardize=True)
    variables = router.init(jax.random.key(0), meta)
    statistics = {
        name: {"mean": rng.standard_normal((read_layers, width)), "deviation": 0.5 + rng.random((read_layers, width))}
        for name, width in (("input", C), ("center", N))
    }
    stats = {**variables["batch_stats"], **jax.tree.map(jnp.asarray, statistics)}
    gates, _ = router.apply({**variables, "batch_stats": stats}, meta, True, mutable=["batch_stats"])
    params = {name: np.asarray(x, np.float64) for name, x in variables["params"].items() if name != "norm"}
    scale, bias = (np.asarray(variables["params"]["norm"][name]).reshape(L, E) for name in ("scale", "bias"))
    x = (meta - statistics["input"]["mean"]) / statistics["input"]["deviation"]
    hidden = x @ params["f1"]
    point = (hidden / (1 + np.exp(-hidden))) @ params["f2"]
    point = (point - statistics["center"]["mean"]) / statistics["center"]["deviation"]
    point /= np.sqrt(np.mean(point**2, axis=-1, keepdims=True) + 1e-6)
    for layer in range(L):
        logits = point[:, layer % read_layers] @ params["heads"][layer]
        z = (logits - logits.mean(axis=0)) / np.sqrt(logits.var(axis=0) + 1e-5)
        expected = (z * scale[layer] + bias[layer]) / np.sqrt(E)
        np.testing.assert_allclose(gates.weight[:, layer], expected, **SAME)
    assert np.any(np.asarray(gates.weight) < 0)
    assert 0.2 < np.std(bias) < 1.0  # signed gates start with a part that all prompts share


@pytest.mark.usefixtures("float64")
def test_the_readers_loss_in_numpy():
    rng = np.random.default_rng(1)
    x, f1, projection = rng.standard_normal((6, L, 5)), rng.standard_normal((5, 4)), rng.standard_normal((4, 3))
    labels = np.array([0, 0, 1, 1, 2, 2])
    hidden = x @ f1
    point = ((hidden / (1 + np.exp(-hidden))) @ projection).mean(axis=1)
    point -= point.mean(axis=0)
    point /= np.linalg.norm(point, axis=1, keepdims=True)
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        exponents = np.array([point[i] @ point[j] / 0.1 for j in others])
        (twin,) = [j for j in others if labels[j] == labels[i]]
        total -= point[i] @ point[twin] / 0.1 - np.log(np.sum(np.exp(exponents)))
    found = contrastive_loss((jnp.asarray(f1), jnp.asarray(projection)), jnp.asarray(x), jnp.asarray(labels), None)
    np.testing.assert_allclose(found, total / 6, **SAME)


def test_the_reader_learns_to_tell_tasks_apart():
    """Prompts of a task share a direction that is small beside their noise; the hidden layer learns to look at it."""
    rng = np.random.default_rng(0)
    tasks, each, X, H = 12, 30, 40, 32
    labels = np.repeat(np.arange(tasks), each)
    signal = rng.standard_normal((tasks, 6))
    x = rng.standard_normal((len(labels), 2, X))
    x[:, :, :6] = signal[labels][:, None] + 0.3 * rng.standard_normal((len(labels), 2, 6))
    x = x.astype(np.float32)
    layers = tuple(jnp.asarray(rng.standard_normal(s) * s[0] ** -0.5, jnp.float32) for s in ((X, H), (H, 8)))

    def nearest_is_twin(layers):
        point = np.asarray(points(layers, x).mean(axis=1))
        point = point - point.mean(axis=0)
        point /= np.linalg.norm(point, axis=1, keepdims=True)
        cosine = point @ point.T
        np.fill_diagonal(cosine, -9)
        return np.mean(labels[cosine.argmax(axis=1)] == labels)

    taught = contrast(layers, lambda index: x[index], labels, 300, 0)
    assert nearest_is_twin(taught) > nearest_is_twin(layers) + 0.2


def test_a_reader_needs_prompts_of_one_task():
    with pytest.raises(DataError):
        contrast(
            (jnp.ones((3, 2)), jnp.ones((2, 2))),
            lambda index: np.ones((len(index), 1, 3), np.float32),
            np.arange(4),
            1,
            0,
        )
