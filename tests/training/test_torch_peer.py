"""The training step in torch that `benchmarks/torch_step.py` measures against computes what this project's does."""

import dataclasses
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import experiment, generator_variables, raises, write_model

from lora_gen_jax.config import ModelConfig
from lora_gen_jax.data.pipeline import Shard, build_batch
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import load_pair
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.prepare import make_sampler, training_tasks
from lora_gen_jax.training.step import TrainState, edge_loss, make_train_step

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS = 3
# Both in float32, whose sums are rounded by 2^-24 a term: three layers of seven sums of at most 50 terms there, and as
# many back, of numbers up to the largest gradient.
ROUNDING = 2 * 3 * 7 * 50 * 2.0**-24


@pytest.fixture(scope="module")
def peer():
    """The module `benchmarks/torch_trainer.py`; one thread, since the models are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("torch_trainer")
    finally:
        sys.path.remove(str(BENCHMARKS))
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def setting(request, tmp_path_factory):
    """(config, pair, variables with B away from zero, batches).

    Of two models of other depths, or of one that is both and BatchNorm by layer.
    """
    root = tmp_path_factory.mktemp("torch_peer")
    config = experiment(root, root / "run", steps=5, warmup_steps=2, clip_norm=0.5, weight_decay=0.1)
    if request.param == "two models":
        cloud = ModelConfig(str(write_model(root / "cloud", seed=1, layers=3)), dtype="float32")
        config = dataclasses.replace(config, cloud=cloud)
    # A balance loss that counts.
    settings = dataclasses.replace(config.generator, dropout=0.0, cv_coefficient=0.3)
    settings = dataclasses.replace(settings, batch_norm_by_layer=request.param == "one model")
    config = dataclasses.replace(config, generator=settings)
    pair = load_pair(config)
    sampler = make_sampler(config, pair, training_tasks(config), "train")
    batches = [build_batch(sampler, (0, number), Shard()) for number in range(STEPS)]
    variables = generator_variables(make_generator(config, pair), pair.cloud.params, batches[0].prompts)
    return config, pair, variables, batches


def recorder():
    """An optimizer's first link: it changes nothing, and its state is the gradient as it came."""
    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, *_: (g, g))


def by_path(tree):
    """A tree's leaves by their paths."""
    return {tuple(part.key for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("setting", ["two models"], indirect=True)
def test_steps_gradients_and_parameters(peer, setting):
    config, pair, variables, batches = setting
    generator = make_generator(config, pair)
    optimizer = optax.chain(recorder(), make_optimizer(config.train))
    trainer = peer.TorchTrainer(pair, config, variables["params"])
    step = make_train_step(generator, pair.edge.decoder, optimizer, config)
    # The step takes the memory of its state.
    params, batch_stats = jax.tree.map(jnp.copy, (variables["params"], variables["batch_stats"]))
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))
    clear: dict = {}
    for batch in batches:
        trainer.optimizer.zero_grad()
        trainer.model(peer.tensors_of(batch)).total.backward()
        theirs = {path: leaf.read("grad").copy() for path, leaf in trainer.leaves.items()}
        state, metrics = step(state, pair.frozen, batch)
        gradients = by_path(state.opt_state[0])
        assert gradients.keys() == theirs.keys()
        largest = max(float(np.max(np.abs(gradient))) for gradient in gradients.values())
        for path, gradient in gradients.items():
            assert np.any(gradient), path
            np.testing.assert_allclose(theirs[path], gradient, rtol=0, atol=ROUNDING * largest, err_msg=str(path))
            clear[path] = clear.get(path, True) & (np.abs(theirs[path] - gradient) < 1e-3 * np.abs(gradient))
        for name, value in trainer.step(batch).items():
            np.testing.assert_allclose(value, metrics[name], rtol=ROUNDING, err_msg=name)
    start = by_path(variables["params"])
    for path, value in by_path(state.params).items():
        assert not np.array_equal(value, start[path]), path
        # Adam's updates go by the sign of a gradient, also of one that is all but zero. Where the gradients agreed to a
        # thousandth, so do the updates, within ten of those each.
        moved, atol = np.asarray(clear[path]), 0.03 * config.train.learning_rate
        assert np.mean(moved) > 0.5, path
        theirs, ours = trainer.leaves[path].read("data")[moved], np.asarray(value)[moved]
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=atol, err_msg=str(path))


@pytest.mark.parametrize("setting", ["one model"], indirect=True)
def test_gates_and_loss_of_one_model_that_is_both(peer, setting):
    config, pair, variables, (batch, *_) = setting
    generator = make_generator(config, pair)

    @jax.jit
    def ours(variables):
        made, _ = generator.apply(variables, pair.cloud.params, batch.prompts, True, mutable=["batch_stats"])
        return made.gates.dense(), edge_loss(pair.edge.decoder, pair.edge.params, made.adapter, batch, {})

    gates_PLE, loss = ours(variables)
    trainer = peer.TorchTrainer(pair, config, variables["params"])
    result = trainer.model(peer.tensors_of(batch))
    assert np.count_nonzero(gates_PLE) == gates_PLE.shape[0] * gates_PLE.shape[1] * config.generator.top_k
    np.testing.assert_allclose(result.gates_PLE.detach().numpy(), gates_PLE, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(result.loss.item(), loss, rtol=ROUNDING)
    # One copy of the weights, and no frozen one that trains.
    frozen = [p.data_ptr() for p in trainer.model.parameters() if not p.requires_grad]
    leaves = jax.tree.leaves(pair.edge.params)
    assert sum(p.numel() for p in trainer.model.parameters() if p.data_ptr() in frozen) == sum(x.size for x in leaves)
    assert sum(p.numel() for p in trainer.trainable) == sum(x.size for x in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("setting", ["one model"], indirect=True)
@pytest.mark.parametrize("change", [{"dropout": 0.05}, {"pool": "per_layer"}, {"routing": "gumbel_top_k"}])
def test_other_variants_are_refused(peer, setting, change):
    config, pair, variables, _ = setting
    config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, **change))
    field = "generator.dropout" if "dropout" in change else "generator"
    with raises(ConfigError, field):
        peer.TorchTrainer(pair, config, variables["params"])
