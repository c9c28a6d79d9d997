"""Multi-task LoRA: one pair of factors per layer and site, the same for every prompt.

In: nothing but shapes. Out: `Generated` with a `LoRA` adapter. It is trained on the same batches as LoRA-Gen and never
sees the prompt, so it can learn what the tasks have in common and not which of them is asked for.
"""

from typing import Any

import flax.linen as nn

from lora_gen_jax.adapters.lora import LoRA, factor_a_init
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.generator.cloud import PackedPrompts
from lora_gen_jax.generator.lora_gen import Generated


class MultiTaskLoRA(nn.Module):
    """ΔW = (α/r)·A·B; A Kaiming-uniform, B zero. Called as `LoRAGen` is, so that one loop trains both.

    Attributes:
        edge: of the model that carries the LoRA.
        settings: `lora_gen_jax.config.GeneratorConfig`: rank, alpha, dropout and lora_sites.
    """

    edge: DecoderConfig
    settings: Any

    @nn.compact
    def __call__(self, frozen_cloud: Any, prompts: PackedPrompts, train: bool = False) -> Generated:
        """The adapter; the cloud's weights and the prompts are not read."""
        s, layers, factors = self.settings, self.edge.num_layers, {}
        for site in s.lora_sites:
            if site == "gate" and not self.edge.gated_ffn:
                continue
            inputs, outputs = self.edge.site_shape(site)
            a = self.param(f"{site}_a", factor_a_init, (layers, inputs, s.rank))
            b = self.param(f"{site}_b", nn.initializers.zeros_init(), (layers, s.rank, outputs))
            factors[site] = {"a": a, "b": b}
        return Generated(LoRA(factors, s.alpha / s.rank, s.dropout), None)
