"""Methods that take a few steps on a prompt's own shots: on LoRA-Gen's gates, on factors beside them, or from nothing.

In: a task's prompt with its shots; but for a LoRA from nothing, a checkpoint of LoRA-Gen. Out: the edge model with what
was learned merged. The steps are those of `lora_gen_jax.specialization.refine`: edge model and pool stay as they are.

    refined          steps on the gates that the prompt was read as
    refined_lora     steps on factors beside the update that the prompt was read as
    refined_both     steps on the gates, then on such factors
    equal_refined    steps on gates that no prompt was read for: all experts alike
    shots_lora       steps on factors only: a LoRA trained from scratch
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.config import Config, EvalConfig
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.generator.router import Gates
from lora_gen_jax.generator.trained_module import Generated
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.methods.lora_gen import reader
from lora_gen_jax.methods.lorahub import shots_of
from lora_gen_jax.methods.method import Method, Prompt, Specialize, Traits, merge_if_possible
from lora_gen_jax.models import Pair
from lora_gen_jax.specialization.refine import refine
from lora_gen_jax.specialization.settings import RefineConfig

if TYPE_CHECKING:
    from lora_gen_jax.training.checkpoint import Loaded


def no_update(edge: DecoderConfig) -> GatedPool:
    """A pool of one expert that adds nothing, for factors to stand beside."""
    pool = {}
    for site in edge.ffn_sites:
        inputs, outputs = edge.site_shape(site)
        pool[site] = {"a": jnp.zeros((1, inputs, 1)), "b": jnp.zeros((1, 1, outputs))}
    gates = Gates.of_all(jnp.zeros((edge.num_layers, 1, 1)))
    return GatedPool({"gates": gates}, {"pool": pool}, scale=1.0)


def starting(key: str, config: Config, pair: Pair, loaded: "Loaded | None") -> Callable[[str], Generated]:
    """From a prompt's text to what a method's steps begin with."""
    if loaded is None:
        return lambda text: Generated(no_update(pair.edge.config))
    read = reader(config, pair, loaded)
    if key != "equal_refined":
        return read

    def equal(text: str) -> Generated:
        made = read(text)
        return made.replace(logits_PLE=jax.tree.map(jnp.zeros_like, made.logits_PLE))

    return equal


def method(key: str, title: str, steps: Callable[[EvalConfig], RefineConfig], checkpoint: str | None) -> Method:
    """A method whose steps are set by `steps`."""

    def specialize(config: Config, pair: Pair, loaded: "Loaded | None") -> Specialize:
        edge, trained = pair.edge, config if loaded is None else loaded.config
        start = starting(key, config, pair, loaded)

        def specialized(prompt: Prompt | None) -> EdgeModel:
            shots = shots_of(edge, prompt)
            made = start("" if prompt is None else prompt.text)
            found = refine(edge.decoder, edge.params, made, [shots], trained.generator, steps(config.eval))
            return merge_if_possible(edge.plain, found.adapter.select(0))

        return specialized

    return Method(
        key=key,
        title=title,
        traits=Traits(compresses_context=True, merged=True, training_free=False, transfers=checkpoint is not None),
        build=None,
        specialize=specialize,
        depends_on_prompt=True,
        needs_shots=True,
        settings=lambda config: dataclasses.asdict(steps(config.eval)),
        checkpoint=checkpoint,
    )


REFINED = method("refined", "LoRA-Gen, gates refined", lambda e: e.refine, "lora_gen")
REFINED_LORA = method("refined_lora", "LoRA-Gen, factors refined", lambda e: e.refine_lora, "lora_gen")
REFINED_BOTH = method(
    "refined_both",
    "LoRA-Gen, gates and then factors refined",
    lambda e: e.refining("both"),
    "lora_gen",
)
EQUAL_REFINED = method("equal_refined", "equal gates, refined", lambda e: e.refine, "lora_gen")
SHOTS_LORA = method(
    "shots_lora",
    "LoRA from the shots",
    lambda e: RefineConfig("lora", e.lora_steps, e.lora_rate),
    None,
)
"""Of the rank that factors have beside an update, 8."""
