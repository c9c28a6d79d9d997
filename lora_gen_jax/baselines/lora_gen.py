"""LoRA-Gen as one of the compared methods; the method itself is `lora_gen_jax.generator`."""

from typing import TYPE_CHECKING

from lora_gen_jax.baselines.method import Method, Prompt, Specialise, Specialised, Traits, beside_or_merged
from lora_gen_jax.config import Config
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.generator.specialize import specialize

if TYPE_CHECKING:
    from lora_gen_jax.models import Pair
    from lora_gen_jax.training.checkpoint import Loaded


def build(config: Config, pair: "Pair") -> LoRAGen:
    """The generator of a config."""
    cloud = pair.cloud.decoder
    return LoRAGen(
        cloud.config,
        pair.edge.config,
        config.generator,
        dtype=cloud.dtype,
        remat=cloud.remat,
        unroll=cloud.unroll,
        attention=cloud.attention,
    )


def specialise(config: Config, pair: "Pair", loaded: "Loaded | None") -> Specialise:
    """The cloud reads the prompt, the gated products are merged; without a prompt the base."""
    assert loaded is not None
    generator, variables = build(loaded.config, pair), loaded.variables

    def specialised(prompt: Prompt | None) -> Specialised:
        if prompt is None:
            return Specialised(pair.edge.params)
        ids = pair.cloud.encoder.prompt(prompt.text)
        generated = specialize(generator, variables, pair.cloud.params, [ids], config.eval.prompt_limit)
        return beside_or_merged(pair.edge.params, generated.adapter.select(0))

    return specialised


METHOD = Method(
    key="lora_gen",
    title="LoRA-Gen",
    traits=Traits(compresses_context=True, merged=True, training_free=True, transfers=True),
    build=build,
    specialise=specialise,
    depends_on_prompt=True,
)
