"""The work that is the same for all methods whose cost is measured, and what makes each of them ready for it.

In: a pair of models, and sizes or texts. Out: a `Workload`; by name of a method the function from `Setup` to `Ready`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lora_gen_jax.data.prompts import behind
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.timing import timed
from lora_gen_jax.inference.edge_model import Prefix
from lora_gen_jax.inference.prefix import encode_prefix
from lora_gen_jax.methods.answering import Ready, Setup, Workload
from lora_gen_jax.methods.registry import BASE, FULL_PROMPT, METHODS
from lora_gen_jax.models import Pair

KEPT_PREFIX = "icl_kept_prefix"
UNTRAINED_ROWS = (BASE.key, FULL_PROMPT.key, KEPT_PREFIX)
"""What is measured without a run: the edge model reads only the query, the prompt before it, or the prompt once."""


def workload_of_sizes(pair: Pair, instruction: int, query: int, new_tokens: int) -> Workload:
    """Random ids, always the same: what is measured depends only on their number."""
    rng = np.random.default_rng(0)

    def ids(model: Any, count: int) -> list[int]:
        # The first ids of most vocabularies are control tokens.
        known = len(model.encoder.tokenizer)
        return rng.integers(min(16, known // 2), known, count).tolist()

    prompt, asked = ids(pair.edge, instruction), ids(pair.edge, query)
    return checked(Workload(ids(pair.cloud, instruction), asked, prompt + asked, instruction, new_tokens), pair)


def workload_of_texts(pair: Pair, prompt: str, query: str, new_tokens: int) -> Workload:
    """A real prompt and query: the prompt, a blank line, the query."""
    encoder = pair.edge.encoder
    query = query.rstrip()
    whole, alone = encoder.text(behind(prompt.rstrip(), query)), encoder.prompt(prompt)
    same = (a == b for a, b in zip(whole[:-1], alone, strict=False))
    kept = next((i for i, equal in enumerate(same) if not equal), min(len(whole) - 1, len(alone)))
    return checked(Workload(pair.cloud.encoder.prompt(prompt), encoder.text(query), whole, kept, new_tokens), pair)


def checked(work: Workload, pair: Pair) -> Workload:
    """The workload itself."""
    if min(len(work.cloud_prompt), len(work.query), work.kept) < 1 or work.new_tokens < 2:
        problem = "--instruction-tokens and --input-tokens must be at least 1, --new-tokens at least 2"
        raise ConfigError(problem, field="--new-tokens" if work.new_tokens < 2 else "--instruction-tokens")
    for tokens, model, what in (
        (len(work.whole) + work.new_tokens, pair.edge.config, "instruction, input and --new-tokens"),
        (len(work.cloud_prompt) + pair.edge.config.num_layers, pair.cloud.config, "the instruction with meta tokens"),
    ):
        if tokens > model.max_positions:
            problem = f"{what} are {tokens} tokens, but the model has {model.max_positions} positions"
            remedy = "lower --instruction-tokens (a shorter --prompt), --input-tokens or --new-tokens"
            raise ConfigError(problem, field="--instruction-tokens", remedy=remedy)
    return work


def kept_prefix(setup: Setup) -> Ready:
    """The instruction is read once; its keys and values are kept."""
    edge, work = setup.pair.edge, setup.work

    def read() -> Prefix:
        return encode_prefix(edge.plain, work.whole[: work.kept])

    model = edge.plain.replace(prefix=read())
    return setup.ready(work.whole[work.kept :], model, once=lambda: {"prefix": timed(lambda: read().cache)[1]})


def answering() -> dict[str, Callable[[Setup], Ready]]:
    """How each method is made ready to answer, by its key; beside them a kept prefix."""
    made: dict[str, Callable[[Setup], Ready]] = {}
    for key, method in METHODS.items():
        if method.answering is not None:
            made[key] = method.answering
        if method is FULL_PROMPT:
            made[KEPT_PREFIX] = kept_prefix
    return made
