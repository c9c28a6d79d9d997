"""What a training step costs: multiply-adds counted by hand, and the rate at which this machine does them.

In: decoder configs, a `GeneratorConfig` and the shapes of a batch. Out: multiply-adds (MACs; a MAC is two flops)
by part. Counted is what the matmuls of the step execute, padding included and recomputation not.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from lora_gen_jax.adapters.gated_pool import computed_experts
from lora_gen_jax.config import Config, GeneratorConfig
from lora_gen_jax.data.pipeline import Batch
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.flash import LARGEST_BLOCK, fits_flash
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.cloud import CLOUD_SITES
from lora_gen_jax.methods.lora import lora_macs
from lora_gen_jax.methods.registry import trained_method

# A frozen matmul runs forward and once more for the gradient of its input; a trained one a third time.
FROZEN_PASSES, TRAINED_PASSES = 2, 3
# Attention has two matmuls forward (scores, mixing) and four backward.
ATTENTION_PASSES = 3


@dataclasses.dataclass(frozen=True)
class StepCost:
    """MACs of one training step, forward and backward.

    Attributes:
        cloud, edge: frozen linear layers.
        attention: scores and mixing of both models.
        adapters: cloud LoRA and the gated side path (or the direct head), trained.
        logits: at the supervised slots of the edge alone; the cloud computes none.
    """

    cloud: int
    edge: int
    attention: int
    adapters: int
    logits: int

    @property
    def total(self) -> int:
        return self.cloud + self.edge + self.attention + self.adapters + self.logits

    def causal(self) -> "StepCost":
        """With attention below the diagonal alone: what a causal model needs, whatever its kernel computes."""
        return dataclasses.replace(self, attention=self.attention // 2)


def linear_macs(config: DecoderConfig) -> int:
    """MACs of all linear layers for one token, the unembedding not among them."""
    sites = ("q", "k", "v", "o", *config.ffn_sites)
    return config.num_layers * sum(inputs * outputs for inputs, outputs in map(config.site_shape, sites))


def step_cost(cloud: DecoderConfig, edge: DecoderConfig, settings: GeneratorConfig, batch: Batch) -> StepCost:
    """MACs of one step on batches of this shape."""
    rows, cloud_length = batch.prompts.tokens_BT.shape
    prompts, edge_length = batch.tokens_PT.shape
    cloud_tokens, edge_tokens = rows * cloud_length, prompts * edge_length
    attention = rows * cloud_length**2 * cloud.num_heads * cloud.head_dim * cloud.num_layers * 2
    attention += prompts * edge_length**2 * edge.num_heads * edge.head_dim * edge.num_layers * 2
    side = sum(sum(cloud.site_shape(site)) for site in CLOUD_SITES) * settings.cloud_rank
    adapters = cloud_tokens * side * cloud.num_layers
    experts = _experts(settings)
    side = sum(sum(edge.site_shape(site)) for site in edge.ffn_sites) * settings.rank
    adapters += edge_tokens * experts * side * edge.num_layers
    if settings.generator == "direct":
        adapters += prompts * edge.num_layers * settings.direct_width * (cloud.width + side)
    return StepCost(
        cloud=FROZEN_PASSES * cloud_tokens * linear_macs(cloud),
        edge=FROZEN_PASSES * edge_tokens * linear_macs(edge),
        attention=ATTENTION_PASSES * attention,
        adapters=TRAINED_PASSES * adapters,
        logits=FROZEN_PASSES * batch.target_PS.size * edge.width * edge.vocab_size,
    )


def _experts(settings: GeneratorConfig) -> int:
    """Low-rank paths that a token takes beside every linear layer."""
    if settings.generator != "meta_tokens" or settings.mix != "products":
        return 1
    return computed_experts(settings.num_experts, settings.active_experts)


def lora_cost(edge: DecoderConfig, settings: GeneratorConfig, batch: Batch) -> StepCost:
    """MACs of a step of multi-task LoRA: the edge alone."""
    return edge_cost(edge, lora_macs(edge, settings), batch)


def edge_cost(edge: DecoderConfig, token_macs: int, batch: Batch) -> StepCost:
    """MACs of a step without a cloud: the edge, and a side path of `token_macs` a token, over all layers."""
    rows, length = batch.tokens_PT.shape
    return StepCost(
        cloud=0,
        edge=FROZEN_PASSES * rows * length * linear_macs(edge),
        attention=ATTENTION_PASSES * 2 * rows * length**2 * edge.num_heads * edge.head_dim * edge.num_layers,
        adapters=TRAINED_PASSES * rows * length * token_macs,
        logits=FROZEN_PASSES * batch.target_PS.size * edge.width * edge.vocab_size,
    )


def method_cost(config: Config, cloud: DecoderConfig, edge: DecoderConfig, batch: Batch) -> StepCost:
    """MACs of one step of the config's method.

    Raises:
        ConfigError: for a method whose step is not counted.
    """
    method = trained_method(config.method)
    if method.token_macs is None and config.method != "lora_gen":
        raise ConfigError(f"method is {config.method}, the multiply-adds of whose step are not counted", field="method")
    if method.token_macs is None:
        return step_cost(cloud, edge, config.generator, batch)
    return edge_cost(edge, method.token_macs(edge, config), batch)


def executed_cost(cloud: Decoder, edge: Decoder, settings: GeneratorConfig, batch: Batch) -> StepCost:
    """MACs of one step as it runs: `step_cost`, what each model's remat computes a second time, and attention as the
    kernel in use does it.

    Of a layer that is computed again, the result of its last linear layer is not, as no gradient asks for it, unless a
    norm follows. "dots" keeps the results of matmuls, those excepted that are one per prompt or per head.
    """
    cost = step_cost(cloud.config, edge.config, settings, batch)
    rows, cloud_length = batch.prompts.tokens_BT.shape
    prompts, edge_length = batch.tokens_PT.shape
    cloud_tokens, edge_tokens = rows * cloud_length, prompts * edge_length
    again = 0
    if cloud.remat == "full":
        side = sum(sum(cloud.config.site_shape(site)) for site in CLOUD_SITES) * settings.cloud_rank
        again += cloud_tokens * side * cloud.config.num_layers
    if edge.remat != "none":
        sides = {site: edge.config.site_shape(site) for site in edge.config.ffn_sites}
        parts = [a + (b if site != "down" or edge.config.post_norms else 0) for site, (a, b) in sides.items()]
        again += edge_tokens * _experts(settings) * settings.rank * sum(parts) * edge.config.num_layers
    return dataclasses.replace(
        cost,
        cloud=cost.cloud + cloud_tokens * _again_macs(cloud),
        edge=cost.edge + edge_tokens * _again_macs(edge),
        attention=_attention_macs(cloud, rows, cloud_length) + _attention_macs(edge, prompts, edge_length),
        adapters=cost.adapters + again,
    )


def _again_macs(decoder: Decoder) -> int:
    config = decoder.config
    if decoder.remat != "full":
        return 0
    skipped = 0 if config.post_norms else config.num_layers * math.prod(config.site_shape("down"))
    return linear_macs(config) - skipped


def _attention_macs(decoder: Decoder, rows: int, length: int) -> int:
    # Two matmuls forward, again under remat, and four backward. The flash kernel has seven backward, because each of
    # its two passes computes scores and dP anew; it skips blocks above the diagonal.
    config, again = decoder.config, 0 if decoder.remat == "none" else 2
    if decoder.attention == "splash" and fits_flash(length, config):
        block = math.gcd(length, LARGEST_BLOCK)
        pairs = length * (length + block) // 2
        return rows * pairs * (9 + again) * config.num_heads * config.head_dim * config.num_layers
    return rows * length**2 * (6 + again) * config.num_heads * config.head_dim * config.num_layers


def matmul_rate(size: int = 2048, repeats: int = 5, dtype: Any = jnp.float32) -> float:
    """MACs per second of the best of several square matmuls of this `size` on the default device.

    Operands are of `dtype`; the result is of the same type on an accelerator and in fp32 on a CPU.
    """
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    result = jnp.float32 if jax.default_backend() == "cpu" else dtype
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=result))
    multiply(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return size**3 / best
