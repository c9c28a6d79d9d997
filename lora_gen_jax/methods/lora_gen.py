"""LoRA-Gen as one of the compared methods; the method itself is `lora_gen_jax.generator`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import Config
from lora_gen_jax.evaluation.timing import timed
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.generator.trained_module import Generated
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.methods.answering import Ready, Setup
from lora_gen_jax.methods.method import Method, Prompt, Specialize, Traits, merge_if_possible
from lora_gen_jax.models import Pair, check_variables

if TYPE_CHECKING:
    from lora_gen_jax.training.checkpoint import Loaded


def build(config: Config, pair: Pair) -> LoRAGen:
    """The generator of a config."""
    start = pair.cloud.encoder.line_break if config.generator.meta_init == "newline" else None
    return LoRAGen(pair.cloud.decoder, pair.edge.config, config.generator, start)


def reader(config: Config, pair: Pair, loaded: "Loaded") -> Callable[[str], Generated]:
    """From a prompt's text to what the generator says about it; prompts have at most eval.prompt_limit tokens.

    Of an empty text the line break is read that every prompt ends with.
    """
    generator, encoder = build(loaded.config, pair), pair.cloud.encoder
    check_variables(loaded, generator, pair)

    def read(text: str) -> Generated:
        ids = encoder.prompt(text) if text else [encoder.line_break]
        return specialize(generator, loaded.variables, pair.cloud.params, [ids], config.eval.prompt_limit)

    return read


def specializer(config: Config, pair: Pair, loaded: "Loaded | None") -> Specialize:
    """The cloud reads the prompt, the gated products are merged; without a prompt the base."""
    assert loaded is not None
    read = reader(config, pair, loaded)

    def specialized(prompt: Prompt | None) -> EdgeModel:
        if prompt is None:
            return pair.edge.plain
        return merge_if_possible(pair.edge.plain, read(prompt.text).adapter.select(0))

    return specialized


def ready(setup: Setup) -> Ready:
    """The cloud reads the instruction once; the merged edge model reads only the query."""
    params = setup.pair.edge.params

    def once() -> dict[str, float]:
        adapter, reading = timed(setup.specialize)
        _, merging = timed(lambda: merge(params, adapter))
        return {"cloud": reading, "merge": merging}

    return setup.ready(setup.work.query, merge_if_possible(setup.pair.edge.plain, setup.specialize()), once=once)


METHOD = Method(
    key="lora_gen",
    title="LoRA-Gen",
    label="LoRA-Gen, no prompt",
    traits=Traits(compresses_context=True, merged=True, training_free=True, transfers=True),
    build=build,
    specialize=specializer,
    depends_on_prompt=True,
    ready=ready,
    published={},
)
