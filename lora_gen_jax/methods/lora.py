"""Multi-task LoRA: one pair of factors per layer and site, the same for every prompt.

In: nothing but shapes. Out: `Generated` with a `LoRA` adapter. It is trained on the same batches as LoRA-Gen and never
sees the prompt, so it can learn what the tasks have in common and not which of them is asked for.
"""

from typing import Any

import flax.linen as nn

from lora_gen_jax.adapters.lora import LoRA, trained_factors
from lora_gen_jax.config import Config, GeneratorConfig
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.generator.cloud import PackedPrompts
from lora_gen_jax.generator.trained_module import Generated, TrainedModule
from lora_gen_jax.methods.method import Method, Traits, fixed
from lora_gen_jax.models import Pair

SITES = ("q", "v", "gate", "up", "down")


class MultiTaskLoRA(TrainedModule):
    """ΔW = (α/r)·A·B; A Kaiming-uniform, B zero.

    Attributes:
        edge: of the model that carries the LoRA.
        settings: rank, alpha, dropout and lora_sites.
    """

    edge: DecoderConfig
    settings: GeneratorConfig

    @nn.compact
    def __call__(self, frozen: Any, prompts: PackedPrompts | None, train: bool = False) -> Generated:
        """The adapter; neither weights nor prompts are read."""
        s = self.settings
        factors = trained_factors(self, self.edge, lora_sites(self.edge, s, SITES), s.rank)
        return Generated(LoRA(factors, s.alpha / s.rank, s.dropout))


def lora_sites(edge: DecoderConfig, settings: GeneratorConfig, own: tuple[str, ...]) -> tuple[str, ...]:
    """The linear layers that carry a LoRA: those that the settings name, else the method's own; the model has them."""
    sites = own if settings.lora_sites is None else settings.lora_sites
    return tuple(site for site in sites if site != "gate" or edge.gated_ffn)


def lora_macs(edge: DecoderConfig, settings: GeneratorConfig) -> int:
    """Multiply-adds of the side path for one token, over all layers."""
    sites = lora_sites(edge, settings, SITES)
    return edge.num_layers * settings.rank * sum(sum(edge.site_shape(site)) for site in sites)


def build(config: Config, pair: Pair) -> MultiTaskLoRA:
    """The module of a config."""
    return MultiTaskLoRA(pair.edge.config, config.generator)


PUBLISHED = {"rank": 16, "alpha": 16.0}

METHOD = Method(
    key="lora",
    title="LoRA",
    traits=Traits(compresses_context=False, merged=True, training_free=False, transfers=False),
    build=build,
    specialize=fixed(build),
    may_read_prompt=True,
    token_macs=lambda edge, config: lora_macs(edge, config.generator),
    published={"generator": PUBLISHED},
)
