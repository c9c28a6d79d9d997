"""Model flops of the programs, by formula, and what a LoRA step on the same queries would cost.

In: a config, its two models and `Sizes`. Out: flops over all chips; a multiply-add is two. Counted is what the method
needs: forward, activation gradients and adapter weight gradients, attention below its diagonal, no recomputation.
"""

import dataclasses

from lora_gen_jax.config import Config
from lora_gen_jax.inference.cost import Pass, cloud_macs, merge_macs, pass_macs, specialize_macs
from lora_gen_jax.lab.tpu.programs import Sizes, batch_shapes
from lora_gen_jax.methods.lora import lora_macs
from lora_gen_jax.models import Pair
from lora_gen_jax.training.cost import edge_cost, method_cost


def model_flops(name: str, config: Config, pair: Pair, sizes: Sizes, chips: int) -> float:
    """Of one call of the program, over all chips."""
    edge = pair.edge.config
    if name == "train_step":
        return 2.0 * _step(config, pair)
    if name == "specialise":
        length, cloud = config.data.cloud_length, pair.cloud.config
        attention = cloud_macs(cloud, config.generator, 1, length).attention
        read = specialize_macs(cloud, edge, config.generator, length) - attention // 2
        return 2.0 * (read + merge_macs(edge, config.generator))
    rows = sizes.rows * chips
    if name == "decode":
        return 2.0 * pass_macs(edge, Pass(rows, 1, sizes.slots)).total
    macs = pass_macs(edge, Pass(rows, sizes.tokens, sizes.tokens))
    return 2.0 * (macs.total - macs.attention // 2)


def _step(config: Config, pair: Pair) -> int:
    edge, batch = pair.edge.config, batch_shapes(config, pair.edge.config.num_layers)
    return method_cost(config, pair.cloud.config, edge, batch).causal().total


def lora_ratios(config: Config, pair: Pair) -> dict[str, float]:
    """Model flops of the LoRA-Gen step over those of a plain LoRA step on the same queries, whose edge reads prompts.

    Returns:
        "apart": every query is a row of its own behind its prompt; "packed": the queries of a prompt share a row behind
        it (`edge_reads_prompt`).
    """
    data, edge = config.data, pair.edge.config
    layers = edge.num_layers
    prompt = data.cloud_length // data.prompts_per_row - layers
    each = data.queries_per_prompt
    shapes = {
        "apart": (data.prompts_per_step * each, prompt + data.edge_length // each, data.response_slots // each),
        "packed": (data.prompts_per_step, prompt + data.edge_length, data.response_slots),
    }
    ours = _step(config, pair)
    ratios = {}
    for name, (rows, length, slots) in shapes.items():
        changed = dataclasses.replace(
            data, prompts_per_step=rows, prompts_per_row=1, edge_length=length, response_slots=max(1, slots)
        )
        batch = batch_shapes(dataclasses.replace(config, data=changed), layers)
        ratios[name] = ours / edge_cost(edge, lora_macs(edge, config.generator), batch).causal().total
    return ratios
