"""What a server of the shipped pair must answer: `generate` with merged weights, greedy, one prompt at a time.

In: how many of the embedded suite's tasks. Out: their prompts, and an answer to each query. For `serve_load.py`.
"""

import time
from pathlib import Path
from typing import NamedTuple

# The shipped generator of the pocket pair.
GENERATOR = "quickstart"
MAX_TOKENS = 16


class Answer(NamedTuple):
    """What the server must say to a query."""

    text: str
    finish: str
    usage: dict[str, int]


Answers = dict[tuple[str, str], Answer]  # by name and query


def offline_answers(count: int) -> tuple[dict[str, str], Answers, float]:
    """(prompts by name, answers, seconds): what the server must answer."""
    from lora_gen_jax import EdgeModel, GenerationSettings, generate, merge
    from lora_gen_jax.adapters.specialization_fit import adapter_of
    from lora_gen_jax.data.pocket.suite import GROUPS
    from lora_gen_jax.data.prompts import evaluation_shots, system_prompt
    from lora_gen_jax.models import end_ids
    from lora_gen_jax.specializer import Specializer

    tasks = [*GROUPS["pocket_seen"](), *GROUPS["pocket_unseen"](), *GROUPS["pocket_reworded"]()][:count]
    specializer, answers, prompts = Specializer.load(Path(GENERATOR)), {}, {}
    edge, loaded = specializer.pair.edge, specializer.loaded
    stop_ids = end_ids(specializer.config.edge.source, edge)
    began = time.perf_counter()
    for number, task in enumerate(tasks):
        name = f"task-{number:03d}"
        prompts[name] = system_prompt(task.descriptions[0], evaluation_shots(task, 3, 0))
        # One at a time, as the server makes them: in a batch the last bit may differ.
        (made,) = specializer.specialize([prompts[name]])
        adapter = adapter_of(made, loaded.variables, loaded.config.generator)
        params = merge(edge.params, adapter)
        for query in {example.query for example in task.test}:
            ids = edge.encoder.text(query)
            (found,) = generate(
                EdgeModel(edge.decoder, params), [ids], GenerationSettings(max_new_tokens=MAX_TOKENS, stop_ids=stop_ids)
            )
            read, new = len(ids), len(found.ids)
            usage = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
            answers[name, query] = Answer(edge.encoder.decode(found.ids), found.finish, usage)
    return prompts, answers, time.perf_counter() - began
