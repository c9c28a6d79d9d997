"""What a training step costs: multiply-adds of its forward passes (`inference.cost`), times how often each part runs.

In: decoder configs, a `GeneratorConfig` and the shapes of a batch. Out: multiply-adds (MACs; a MAC is two flops)
by part. Counted is what the matmuls of the step execute, padding included and recomputation not.
"""

import dataclasses

from lora_gen_jax.adapters.gated_pool import computed_experts
from lora_gen_jax.config import Config, GeneratorConfig
from lora_gen_jax.data.pipeline import Batch
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.inference.cost import Pass, cloud_macs, direct_macs, pass_macs, side_widths
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
    side = edge.num_layers * side_experts(settings) * settings.rank * sum(side_widths(edge, edge.ffn_sites))
    head = direct_macs(cloud, edge, settings) if settings.generator == "direct" else 0
    own = edge_cost(edge, side, batch)
    return dataclasses.replace(
        own,
        cloud=FROZEN_PASSES * read.linear,
        attention=own.attention + ATTENTION_PASSES * read.attention,
        adapters=own.adapters + TRAINED_PASSES * (read.adapter + batch.tokens_PT.shape[0] * head),
    )


def side_experts(settings: GeneratorConfig) -> int:
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
