"""A generated update with a LoRA beside it: merged as it is beside the weights, prompt by prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EDGE, OPT, SETTINGS, filled, logits, padded, raises, random_params, token_rows

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.adapters.refined import RefinedPool
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.lora_gen import ExpertPool, gated_adapter
from lora_gen_jax.generator.router import Gates, keep_top_k


def refined(config, prompts=2, rank=5, **changes):
    """Gates and factors of some prompts, none of them zero."""
    settings = dataclasses.replace(SETTINGS, **changes)
    layers = config.num_layers if settings.pool == "per_layer" else None
    shapes = jax.eval_shape(ExpertPool(config.ffn_shapes, 4, 3, layers).init, jax.random.key(0))
    pool = {site: {x: filled(shapes, seed=4)["params"][f"{site}_{x}"] for x in "ab"} for site in config.ffn_sites}
    rng = np.random.default_rng(1)
    gates_PLE = rng.dirichlet(np.ones(4), (prompts, config.num_layers)).astype(np.float32)
    gates = Gates.of_all(jnp.asarray(gates_PLE))
    if settings.routing == "keep_top_k":
        gates = keep_top_k(gates.weight, settings.top_k)
    if settings.routing == "linear":
        gates = Gates.of_all(jnp.asarray(rng.standard_normal(gates_PLE.shape, np.float32) * np.float32(0.5)))
    factors = {
        site: {
            "a": rng.standard_normal((config.num_layers, prompts, inputs, rank), np.float32) * np.float32(inputs**-0.5),
            "b": rng.standard_normal((config.num_layers, prompts, rank, outputs), np.float32) * np.float32(0.2),
        }
        for site, (inputs, outputs) in config.ffn_shapes.items()
    }
    generated = gated_adapter(gates, pool, settings)
    return RefinedPool.of(generated, jax.tree.map(jnp.asarray, factors))


CASES = [
    (EDGE, {}),
    (EDGE, {"routing": "linear"}),
    (EDGE, {"pool": "per_layer"}),
    (EDGE, {"mix": "factors"}),
    (OPT, {"routing": "gumbel"}),
]


@pytest.mark.parametrize(("config", "changes"), CASES, ids=["default", "linear", "per_layer", "factors", "opt"])
def test_merged_is_what_stands_beside(config, changes):
    """Logits of about 1 from sums of some 20 terms, in another order: 2e-5 is 100 units of the last place."""
    decoder, params, adapter = Decoder(config), random_params(config, 3), refined(config, **changes)
    rows = token_rows([6, 9, 4, 8], config.vocab_size)
    tokens, positions = padded(rows, 9)
    beside = logits(decoder, params, tokens, positions, adapter=adapter)
    for p in range(2):
        one = adapter.select(p)
        merged = logits(decoder, merge(params, one), tokens, positions)
        own = slice(2 * p, 2 * p + 2)
        seen = (positions >= 0)[own]
        np.testing.assert_allclose(merged[own][seen], beside[own][seen], atol=2e-5)
        # Neither part alone is what both are together.
        for part in (one.generated, one.factors):
            alone = logits(decoder, merge(params, part), tokens, positions)
            assert np.abs(np.asarray(alone[own][seen] - merged[own][seen])).max() > 1e-2


def test_prompts_are_taken_by_their_number():
    adapter = refined(EDGE, prompts=3)
    taken = adapter.take(np.array([2, 0, 2]))
    assert (adapter.prompts, taken.prompts) == (3, 3)
    for place, p in enumerate((2, 0, 2)):
        one, other = taken.select(place), adapter.select(p)
        jax.tree.map(np.testing.assert_array_equal, one.scanned, other.scanned)
    with raises(ConfigError, "prompt", 3):
        adapter.select(3)
    with raises(ConfigError, "adapter", 3):
        merge(random_params(EDGE), adapter)
