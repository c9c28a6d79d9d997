"""A method made ready to answer one query, as its cost is measured (`lora-gen efficiency`, `lora-gen table`).

In: a pair of models, a generator and a `Workload`. Out: a `Ready`: what the edge model reads for a query, with which
weights, and what has to be done once a task before the first query. Each method's own is the `ready` of its `Method`.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from lora_gen_jax.config import Config
from lora_gen_jax.evaluation.timing import timed
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.inference.decode import GenerationSettings, generate, stream
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.models import Pair

if TYPE_CHECKING:
    from lora_gen_jax.generator.trained_module import TrainedModule


@dataclasses.dataclass(frozen=True)
class Workload:
    """One task with one query, as token ids.

    Attributes:
        cloud_prompt: the instruction as the cloud model reads it.
        query: as the edge model reads it without the instruction.
        whole: instruction and query as the edge model reads them together.
        kept: the first ids of `whole`, which are the instruction's and can be read ahead.
        new_tokens: of the answer; it never ends sooner.
    """

    cloud_prompt: list[int]
    query: list[int]
    whole: list[int]
    kept: int
    new_tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What the methods are made from: the models, a LoRA-Gen generator with its variables, and the work."""

    config: Config
    pair: Pair
    generator: Any
    variables: Any
    work: Workload

    def specialize(self) -> Any:
        """The cloud's pass over the instruction: the adapter of one prompt."""
        prompts = [self.work.cloud_prompt]
        return specialize(self.generator, self.variables, self.pair.cloud.params, prompts).adapter.select(0)

    def ready(self, ids: list[int], model: EdgeModel, **more: Any) -> "Ready":
        return Ready(ids, model, self.work.new_tokens, **more)


@dataclasses.dataclass(frozen=True, eq=False)
class Ready:
    """A method that can answer.

    Attributes:
        ids: what the edge model reads for the query.
        model: that answers.
        new_tokens: of the answer.
        adapter_macs: what its adapter adds for one token, over all layers.
        once: does again what is done once a task, and gives the seconds of each stage.
    """

    ids: list[int]
    model: EdgeModel
    new_tokens: int
    adapter_macs: int = 0
    once: Callable[[], dict[str, float]] = dict

    @property
    def kept(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.model.prefix is None else self.model.prefix.length

    def answer(self) -> tuple[float, float, list[int]]:
        """Answers: seconds to the first token and to the last, ids.

        In two runs: the whole answer is one program without a stop, in which no token can be timed.
        """
        settings = GenerationSettings(self.new_tokens)
        first = timed(lambda: next(stream(self.model, [self.ids], settings)))[1]
        made, total = timed(lambda: generate(self.model, [self.ids], settings))
        return first, total, made[0].ids

    def batch(self, rows: int) -> float:
        """Answers in `rows` equal rows: seconds to the last token."""
        settings = GenerationSettings(self.new_tokens)
        return timed(lambda: generate(self.model, [self.ids] * rows, settings))[1]


def untrained(module: "TrainedModule", pair: Pair) -> Any:
    """Fresh variables of a module: training changes no cost."""
    return module.init(jax.random.key(0), None if module.reader is None else pair.frozen[module.reader], None)
