"""Multiply-adds by formula are what the compiler is given to do, for every family; and what that count is made of."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import CLOUD, EDGE, SETTINGS, generator_variables, prompts_of, random_params
from inference_models import CONFIGS, LLAMA, make_gates

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.inference import cost
from lora_gen_jax.inference.cost import Pass, Sizes

PREFILL, BATCH, STEP, BEHIND_PREFIX = Pass(1, 16, 16), Pass(3, 32, 32), Pass(2, 1, 48), Pass(2, 16, 16, kept=32)


def shapes(decoder: Decoder) -> Any:
    """The shapes of a decoder's parameters."""
    return nn.unbox(jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]


@pytest.mark.parametrize("sizes", [PREFILL, BATCH, STEP, BEHIND_PREFIX], ids=["prefill", "batch", "step", "prefix"])
@pytest.mark.parametrize("family", CONFIGS)
def test_formula_agrees_with_the_compiler(family: str, sizes: Pass):
    decoder = Decoder(CONFIGS[family])
    counted = cost.count_pass(decoder, shapes(decoder), None, sizes)
    assert cost.pass_macs(decoder.config, sizes).total == counted.matmuls
    # XLA's own analysis adds elementwise work, much of it in models as narrow as these.
    assert counted.everything is not None
    assert counted.matmuls < counted.everything < 1.5 * counted.matmuls


def test_formula_by_hand():
    # Per layer: q and o 32·32, k and v 32·16, gate, up and down 32·48.
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    found = cost.pass_macs(LLAMA, Pass(3, 5, 7, kept=2, logits=2, adapter=11))
    assert found == cost.Macs(3 * 5 * linear, 3 * 2 * 5 * 9 * 32 * 2, 3 * 2 * 32 * 67, 3 * 5 * 11)
    assert found.total == sum(dataclasses.asdict(found).values())


def test_formula_gives_the_published_figures():
    # Qwen2-1.5B, logits at every position: the paper's Table 13, 300 and 100 tokens.
    qwen2 = dataclasses.replace(
        CONFIGS["qwen2"],
        vocab_size=151936,
        num_layers=28,
        width=1536,
        ffn_width=8960,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        tied_embeddings=True,
    )
    for tokens, published in ((300, 4.708e11), (100, 1.552e11)):
        found = cost.pass_macs(qwen2, Pass(1, tokens, tokens, logits=tokens)).total
        assert float(f"{found:.3e}") == published


def test_wide_model_agrees_with_cost_analysis_elementwise_work_included():
    decoder = Decoder(dataclasses.replace(LLAMA, width=256, ffn_width=768, head_dim=64))
    counted = cost.count_pass(decoder, shapes(decoder), None, Pass(1, 64, 64))
    formula = cost.pass_macs(decoder.config, Pass(1, 64, 64)).total
    assert counted.everything is not None
    assert 0 < counted.everything / formula - 1 < cost.TOLERANCE


def test_a_scanned_layer_counts_as_often_as_it_runs():
    decoder = Decoder(LLAMA)
    rolled = cost.count(cost.lower_pass(decoder, shapes(decoder), None, STEP))
    unrolled = cost.count_pass(decoder, shapes(decoder), None, STEP)
    assert rolled.matmuls == unrolled.matmuls == cost.pass_macs(LLAMA, STEP).total


def test_an_adapter_that_is_not_merged():
    adapter, decoder = make_gates(LLAMA, 1), Decoder(LLAMA)
    # K = 2 of 4 experts: all are computed, as copying the chosen ones would cost more.
    side = LLAMA.num_layers * 4 * 3 * sum(sum(LLAMA.site_shape(site)) for site in LLAMA.ffn_sites)
    sizes = dataclasses.replace(PREFILL, adapter=side)
    assert cost.count_pass(decoder, shapes(decoder), adapter, sizes).matmuls == cost.pass_macs(LLAMA, sizes).total


@pytest.mark.parametrize("changes", [{}, {"generator": "direct"}, {"mix": "factors"}, {"routing": "gumbel"}])
def test_specializing_and_merging(changes: dict[str, str]):
    settings = dataclasses.replace(SETTINGS, **changes)
    generator = LoRAGen(Decoder(CLOUD, unroll=CLOUD.num_layers), EDGE, settings)
    frozen, prompts = random_params(CLOUD), prompts_of([9], 1, 16)
    variables = generator_variables(generator, frozen, prompts)
    reading = cost.count(jax.jit(generator.apply).lower(variables, frozen, prompts))
    assert reading.matmuls == cost.specialize_macs(CLOUD, EDGE, settings, 16)
    made: Any = jax.eval_shape(generator.apply, variables, frozen, prompts)
    merging = cost.count(
        jax.jit(lambda params, a: merge(params, a.select(0))).lower(shapes(Decoder(EDGE)), made.adapter)
    )
    assert merging.matmuls == cost.merge_macs(EDGE, settings)


def test_calls_count_as_often_as_they_happen():
    @jax.jit
    def product(x: jax.Array) -> jax.Array:
        return x @ x

    lowered = jax.jit(lambda x: product(product(x)) + jnp.einsum("ab,cb->ac", x, x)).lower(jnp.ones((3, 3)))
    assert cost.dot_macs(lowered) == 3 * 27


def test_an_answer_is_one_prefill_and_a_step_for_each_further_token():
    prefill, steps = cost.answer_macs(LLAMA, Sizes(tokens=5, kept=4, new=3))
    assert prefill == cost.pass_macs(LLAMA, Pass(1, 5, 9)).total
    assert steps == sum(cost.pass_macs(LLAMA, Pass(1, 1, slots)).total for slots in (10, 11))
    assert cost.answer_macs(LLAMA, Sizes(5, 0, 1))[1] == 0


def test_executed_sizes_are_padded():
    assert Sizes(tokens=100, kept=200, new=32).executed == (Pass(1, 112, 112, kept=224), Pass(1, 1, 160, kept=224))
    assert Sizes(tokens=16, kept=0, new=8, rows=4).executed == (Pass(4, 16, 16), Pass(4, 1, 32))
