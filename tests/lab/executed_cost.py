"""Multiply-adds of a LoRA-Gen step as it runs, recomputation included: what the compiler's count is compared with.

In: a config, its models. Out: flops over all chips.
"""

import dataclasses
import math

from lora_gen_jax.decoder.flash import LARGEST_BLOCK, fits_flash
from lora_gen_jax.generator.cloud import CLOUD_SITES
from lora_gen_jax.inference.cost import linear_macs, side_widths
from lora_gen_jax.lab.tpu.programs import batch_shapes
from lora_gen_jax.training.cost import side_experts, step_cost


def executed_flops(config, pair):
    """Of a step with the recomputation that its remat policies ask for, over all chips."""
    batch = batch_shapes(config, pair.edge.config.num_layers)
    return 2.0 * executed_cost(pair.cloud.decoder, pair.edge.decoder, config.generator, batch).total


def executed_cost(cloud, edge, settings, batch):
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
        again += written.size * side_experts(settings) * settings.rank * widths * edge.config.num_layers
    return dataclasses.replace(
        cost,
        cloud=cost.cloud + read.size * again_macs(cloud),
        edge=cost.edge + written.size * again_macs(edge),
        attention=attention_macs(cloud, *read.shape) + attention_macs(edge, *written.shape),
        adapters=cost.adapters + again,
    )


def again_macs(decoder):
    config = decoder.config
    if decoder.remat != "full":
        return 0
    skipped = 0 if config.post_norms else config.num_layers * math.prod(config.site_shape("down"))
    return linear_macs(config) - skipped


def attention_macs(decoder, rows, length):
    # Two matmuls forward, again under remat, and four backward. The flash kernel has seven backward, because each of
    # its two passes computes scores and dP anew; it skips blocks above the diagonal.
    config, again = decoder.config, 0 if decoder.remat == "none" else 2
    if decoder.attention == "splash" and fits_flash(length, config):
        block = math.gcd(length, LARGEST_BLOCK)
        pairs = length * (length + block) // 2
        return rows * pairs * (9 + again) * config.num_heads * config.head_dim * config.num_layers
    return rows * length**2 * (6 + again) * config.num_heads * config.head_dim * config.num_layers
