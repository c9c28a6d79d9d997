"""Quantized weights: how far they are from what they stand for, what is computed with them, and how they are loaded.

Everything here is in float64, where two programs for one function agree (`SAME`); codes and scales are made in float32.
"""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EDGE, SAME, logits, noise_like, random_params, token_rows, write_model
from safetensors.numpy import save_file

from lora_gen_jax.adapters.lora import LoRA
from lora_gen_jax.adapters.merge import GROUP_OF_SITE
from lora_gen_jax.adapters.protocol import SITES
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import leaves, load_config, load_params
from lora_gen_jax.decoder.quantized import (
    FORMATS,
    NF4,
    NF4_ERROR,
    dequantize,
    quantize,
    quantize_layers,
    quantized_name,
    quantized_product,
)
from lora_gen_jax.models import init_params
from lora_gen_jax.sharding import make_mesh, param_shardings

pytestmark = pytest.mark.float64
NAMES = ("int8", "nf4")
# A weight is at most so many scales from its code's value: half of a step, half of the widest gap.
NEAREST = {"int8": 0.5, "nf4": NF4_ERROR}
# Dividing by the scale in float32 may move a weight that lies halfway.
HALFWAY = 1 + 1e-5


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def values(codes, scales):
    """Plain NumPy: what codes and scales stand for, with the rounding of nf4's float32 product."""
    each = np.repeat(np.asarray(scales, np.float32), codes.shape[-2] // scales.shape[-2], axis=-2)
    if codes.dtype == jnp.int8:
        return np.asarray(codes, np.float64) * each.astype(np.float64)
    table = np.asarray(NF4, np.float32)
    return (table[np.asarray(codes).astype(np.int64)] * each).astype(np.float64)


def plain(params):
    """Quantized parameters as the floats that they stand for, as any other model's."""

    def walk(node):
        if not isinstance(node, dict):
            return node
        rest = {key: walk(value) for key, value in node.items() if key not in ("kernel", "scales")}
        if "scales" in node:
            return rest | {"kernel": jnp.asarray(values(node["kernel"], node["scales"]))}
        return rest | ({"kernel": node["kernel"]} if "kernel" in node else {})

    return walk(params)


@pytest.mark.parametrize("shape", [(128, 24), (3, 96, 5), (2, 20, 7)])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_as_near_as_its_scale_says(name, shape):
    w = np.asarray(normal(0, shape), np.float32).astype(np.float64)
    w[..., 0] = 0.0
    w[..., 1] *= 1e-3
    made = quantize(jnp.asarray(w), name)
    block = FORMATS[name].block_of(shape[-2])
    assert made["kernel"].shape == shape
    assert made["scales"].shape == (*shape[:-2], shape[-2] // block, shape[-1])
    assert {key: x.dtype for key, x in made.items()} == {"kernel": FORMATS[name].codes, "scales": FORMATS[name].scales}
    each = np.repeat(np.asarray(made["scales"], np.float64), block, axis=-2)
    error = np.abs(values(made["kernel"], made["scales"]) - w)
    assert np.all(error <= NEAREST[name] * each * HALFWAY)
    # The bound is no loose one: some weight is nearly so far away.
    assert np.max(error / each) > 0.8 * NEAREST[name]
    np.testing.assert_array_equal(values(made["kernel"], made["scales"])[..., 0], 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_weight_of_a_block_keeps_its_size(name):
    """A scale is as small as it may be: the largest code is used, up to the rounding of the scale."""
    made = quantize(normal(1, (128, 24)), name)
    blocks = np.abs(values(made["kernel"], np.ones_like(made["scales"]))).reshape(made["scales"].shape[0], -1, 24)
    np.testing.assert_array_equal(blocks.max(axis=1), np.full(made["scales"].shape, FORMATS[name].largest))


@pytest.mark.parametrize("name", NAMES)
def test_the_product_and_its_gradient_are_those_of_the_weights_it_stands_for(name):
    made, x, g = quantize(normal(0, (48, 24)), name), normal(1, (2, 5, 48)), normal(2, (2, 5, 24))
    w = values(made["kernel"], made["scales"])
    y, pull = jax.vjp(lambda x: quantized_product(x, made["kernel"], made["scales"]), x)
    np.testing.assert_allclose(y, np.asarray(x) @ w, **SAME)
    np.testing.assert_allclose(pull(g)[0], np.asarray(g) @ w.T, **SAME)
    np.testing.assert_array_equal(dequantize(made["kernel"], made["scales"]), w.astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_rounded_operands_are_off_by_what_rounding_them_says(name, float32):
    """As of `product`: x and, of nf4, w move by 2^-9 of their size; sums of 48 products in fp32 by less than that."""
    made, x = quantize(normal(0, (48, 24)), name), normal(1, (2, 5, 48)).astype(jnp.float32)
    y = np.asarray(quantized_product(x, made["kernel"], made["scales"], jnp.bfloat16), np.float64)
    x, w = np.asarray(x, np.float64), values(made["kernel"], made["scales"])
    u = 2.0**-9
    moved = {"int8": u, "nf4": 2 * u + u**2}[name]
    assert np.all(np.abs(y - x @ w) <= (moved + 50 * 2.0**-24) * (np.abs(x) @ np.abs(w)))


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_pass_keeps_codes_and_neither_activations_nor_float_weights(name):
    made = quantize(normal(0, (48, 24)), name)
    _, pull = jax.vjp(lambda x: quantized_product(x, made["kernel"], made["scales"]), normal(1, (64, 48)))
    kept = {(x.shape, x.dtype) for x in jax.tree.leaves(pull) if x.size}
    assert kept == {(x.shape, x.dtype) for x in made.values()}


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_as_near_as_the_scales_say(name):
    """|Δ logit| <= max over t of Σ |∂ logit/∂w at w + t(ŵ - w)|·NEAREST·scale, by the mean value theorem.

    The maximum is taken over five points of the line, and the bound is a sum of absolute values: far above what errors
    of random signs do, so that what the gradient does between the points does not matter.
    """
    params, tokens = random_params(EDGE), jnp.asarray(token_rows([9], EDGE.vocab_size))
    quantized = quantize_layers(params, name)
    decoder, near = Decoder(EDGE), plain(quantized)
    far = jax.tree.map(lambda x: x.astype(jnp.float64), params)

    def last(layers):
        return logits(decoder, {**far, "layers": layers}, tokens)[0, -1]

    def allowed(path, x):
        node = quantized["layers"]
        for key in path[:-1]:
            node = node[key.key]
        if "scales" not in node:
            return jnp.zeros_like(x)
        each = jnp.repeat(node["scales"].astype(x.dtype), x.shape[-2] // node["scales"].shape[-2], axis=-2)
        return NEAREST[name] * HALFWAY * each

    moves = jax.tree_util.tree_map_with_path(allowed, far["layers"])
    slopes = jax.jit(jax.jacrev(last))

    def bound(t):
        at = jax.tree.map(lambda a, b: a + t * (b - a), far["layers"], near["layers"])
        terms = jax.tree.map(lambda s, m: jnp.sum(jnp.abs(s) * m[None], axis=range(1, s.ndim)), slopes(at), moves)
        return sum(jax.tree.leaves(terms))

    most = np.max([bound(t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)], axis=0)
    exact, found = last(far["layers"]), logits(decoder, quantized, tokens)[0, -1]
    difference = np.abs(np.asarray(found - exact))
    assert np.all(difference <= most), (difference / most).max()
    assert difference.max() > 0.01 * most.min()
    # What is computed is the model of the weights that codes and scales stand for.
    np.testing.assert_allclose(found, last(near["layers"]), **SAME)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_what_stands_beside_are_those_of_the_float_model(name, remat):
    quantized, tokens = quantize_layers(random_params(EDGE), name), jnp.asarray(token_rows([8, 8], EDGE.vocab_size))
    shapes = {
        site: {"a": (EDGE.num_layers, inputs, 2), "b": (EDGE.num_layers, 2, outputs)}
        for site in ("q", "o", "gate", "down")
        for inputs, outputs in [EDGE.site_shape(site)]
    }
    zeros = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    factors, decoder = jax.tree.map(lambda x: 0.2 * x, noise_like(zeros, seed=5)), Decoder(EDGE, remat=remat)

    @jax.jit
    def gradient(factors, params):
        def loss(factors):
            found = logits(decoder, params, tokens, adapter=LoRA(scanned=factors, scale=0.5))
            return jnp.mean(jax.nn.logsumexp(found, axis=-1) - found[..., 3])

        return jax.grad(loss)(factors)

    found, expected = (gradient(factors, params) for params in (quantized, plain(quantized)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), found, expected)
    assert all(np.max(np.abs(x)) > 1e-6 for x in jax.tree.leaves(found))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_layers_matrices_are_quantized(name):
    config = dataclasses.replace(EDGE, tied_embeddings=False)
    params = random_params(config)
    quantized = quantize_layers(params, name)
    assert quantized_name(params) is None
    assert quantized_name(quantized) == name
    before = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    after = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(quantized)}
    sites = {f"['layers']['{GROUP_OF_SITE[site]}']['{site}']" for site in SITES}
    changed = {path for path in before if after[path] is not before[path]}
    assert changed == {f"{site}['kernel']" for site in sites}
    assert after.keys() - before.keys() == {f"{site}['scales']" for site in sites}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [None, (1, 4, 1), (1, 2, 2), (2, 1, 2)], ids=str)
def test_a_file_is_loaded_as_the_codes_of_its_numbers(tmp_path, monkeypatch, name, sizes, float32):
    """On one device and in pieces, whose scales need numbers of other pieces; read in blocks of few rows."""
    monkeypatch.setattr("lora_gen_jax.decoder.pretrained.assembly._BLOCK_ELEMENTS", 200)
    directory = write_model(tmp_path / "model")
    expected = quantize_layers(load_params(directory), name)
    shardings = None
    if sizes is not None:
        decoder = Decoder(load_config(directory))
        shardings = param_shardings(make_mesh(*sizes), lambda: init_params(decoder, weights=name))
    found = load_params(directory, shardings=shardings, weights=name)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), path
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=str(path))
    if sizes is not None:
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)), found, shardings)
        assert not found["layers"]["ffn"]["up"]["kernel"].sharding.is_fully_replicated


def test_loading_holds_no_float_copy_of_a_matrix(tmp_path, monkeypatch, float32):
    """Of what NumPy allocates; JAX holds the codes, and the file is mapped. Blocks are of 64 KiB in float32."""
    monkeypatch.setattr("lora_gen_jax.decoder.pretrained.assembly._BLOCK_ELEMENTS", 1 << 14)
    hf = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(hf))
    tensors = {
        name: np.ones(leaf.stored_shape, np.float32)
        for leaf in leaves(DecoderConfig.from_hf(hf))
        for name in leaf.tensor_names(4)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    one_matrix = 256 * 1024 * 4
    load_params(tmp_path, weights="nf4")  # what is imported and traced at first
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        load_params(tmp_path, weights="nf4")
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    # Codes of up to three layers that JAX has not copied yet, a byte each, and six times a block on the way to codes
    # are 1.13 matrices; the floats of one would be another, and its quotients by the scales a third.
    assert peak < 1.5 * one_matrix
