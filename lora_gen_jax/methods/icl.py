"""The edge model as it is, and in-context learning: it reads the task's prompt, shots included, before every query.

Nothing is trained.
"""

from lora_gen_jax.methods.method import Method, Traits, base

BASE = Method(
    key="base",
    title="base",
    label="base, no prompt",
    traits=Traits(compresses_context=False, merged=True, training_free=True, transfers=False),
    build=None,
    specialize=base,
    ready=lambda setup: setup.ready(setup.work.query, setup.pair.edge.plain),
)
METHOD = Method(
    key="icl",
    title="ICL",
    label="in-context learning",
    traits=Traits(compresses_context=False, merged=True, training_free=True, transfers=False),
    build=None,
    specialize=base,
    edge_reads_prompt=True,
    ready=lambda setup: setup.ready(setup.work.whole, setup.pair.edge.plain),
)
