"""In-context learning: the edge model reads the task's prompt, shots included, before every query.

Nothing is trained.
"""

from lora_gen_jax.methods.method import Method, Traits, base

METHOD = Method(
    key="icl",
    title="ICL",
    traits=Traits(compresses_context=False, merged=True, training_free=True, transfers=False),
    build=None,
    specialize=base,
    edge_reads_prompt=True,
)
