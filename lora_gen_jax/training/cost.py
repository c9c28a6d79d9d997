"""What a training step costs: multiply-adds of its forward passes (`inference.cost`), times how often each part runs.

In: decoder configs, a `GeneratorConfig` and the shapes of a batch. Out: multiply-adds (MACs; a MAC is two flops)
by part. Counted is what the matmuls of the step execute, padding included and recomputation not.
"""

import dataclasses
import math

from lora_gen_jax.adapters.gated_pool import computed_experts
from lora_gen_jax.config import Config, GeneratorConfig
from lora_gen_jax.data.pipeline import Batch
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.flash import LARGEST_BLOCK, fits_flash
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.cloud import CLOUD_SITES
from lora_gen_jax.inference.cost import Pass, cloud_macs, direct_macs, linear_macs, pass_macs, side_widths
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
        logits: only at the supervised slots of the edge; the cloud computes none.
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
        """With attention only below the diagonal: what a causal model needs, whatever its kernel computes."""
        return dataclasses.replace(self, attention=self.attention // 2)


def edge_cost(edge: DecoderConfig, token_macs: int, batch: Batch) -> StepCost:
    """MACs of a step without a cloud: the edge, and a side path of `token_macs` a token, over all layers."""
    rows, length = batch.tokens_PT.shape
    once = pass_macs(edge, Pass(rows, length, length, logits=batch.target_PS.shape[1], adapter=token_macs))
    return StepCost(
        cloud=0,
        edge=FROZEN_PASSES * once.linear,
        attention=ATTENTION_PASSES * once.attention,
        adapters=TRAINED_PASSES * once.adapter,
        logits=FROZEN_PASSES * once.logits,
    )


def step_cost(cloud: DecoderConfig, edge: DecoderConfig, settings: GeneratorConfig, batch: Batch) -> StepCost:
    """MACs of one step of LoRA-Gen on batches of this shape."""
    read = cloud_macs(cloud, settings, *batch.prompts.tokens_BT.shape)
    side = edge.num_layers * _experts(settings) * settings.rank * sum(side_widths(edge, edge.ffn_sites))
    head = direct_macs(cloud, edge, settings) if settings.generator == "direct" else 0
    own = edge_cost(edge, side, batch)
    return dataclasses.replace(
        own,
        cloud=FROZEN_PASSES * read.linear,
        attention=own.attention + ATTENTION_PASSES * read.attention,
        adapters=own.adapters + TRAINED_PASSES * (read.adapter + batch.tokens_PT.shape[0] * head),
    )


def _experts(settings: GeneratorConfig) -> int:
    """Low-rank paths that a token takes beside every linear layer."""
    if settings.generator != "meta_tokens" or settings.mix != "products":
        return 1
    return computed_experts(settings.num_experts, settings.active_experts)


def method_cost(config: Config, cloud: DecoderConfig, edge: DecoderConfig, batch: Batch) -> StepCost:
    """MACs of one step of the config's method. Raises ConfigError for a method whose step is not counted."""
    method = trained_method(config.method)
    if method.token_macs is not None:
        return edge_cost(edge, method.token_macs(edge, config), batch)
    if not method.traits.transfers:
        raise ConfigError(f"method is {config.method}, the multiply-adds of whose step are not counted", field="method")
    return step_cost(cloud, edge, config.generator, batch)


def executed_cost(cloud: Decoder, edge: Decoder, settings: GeneratorConfig, batch: Batch) -> StepCost:
    """MACs of one step as it runs: `step_cost`, what each model's remat computes a second time, and attention as the
    kernel in use does it.

    Of a layer that is computed again, the result of its last linear layer is not, as no gradient asks for it, unless a
    norm follows. "dots" keeps the results of matmuls, those excepted that are one per prompt or per head.
    """
    cost = step_cost(cloud.config, edge.config, settings, batch)
    read, written = batch.prompts.tokens_BT, batch.tokens_PT
    again = 0
    if cloud.remat == "full":
        again += read.size * settings.cloud_rank * sum(side_widths(cloud.config, CLOUD_SITES)) * cloud.config.num_layers
    if edge.remat != "none":
        sites, (_, width) = edge.config.ffn_sites, edge.config.site_shape("down")
        widths = sum(side_widths(edge.config, sites)) - (0 if edge.config.post_norms else width)
        again += written.size * _experts(settings) * settings.rank * widths * edge.config.num_layers
    return dataclasses.replace(
        cost,
        cloud=cost.cloud + read.size * _again_macs(cloud),
        edge=cost.edge + written.size * _again_macs(edge),
        attention=_attention_macs(cloud, *read.shape) + _attention_macs(edge, *written.shape),
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
