"""The methods whose cost is measured, and the work that is the same for all of them.

In: a pair of models, a generator and a `Workload`. Out: for each method a `Ready`: what the edge model reads for a
query, with which weights, and what has to be done once a task before the first query.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.buckets import bucket
from lora_gen_jax.config import Config
from lora_gen_jax.data.prompts import behind
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.timing import timed
from lora_gen_jax.generator.cloud import PackedPrompts, pack_prompts
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.inference.decode import GenerationSettings, generate, stream
from lora_gen_jax.inference.edge_model import EdgeModel, Prefix
from lora_gen_jax.inference.prefix import compress, encode_prefix, encode_soft
from lora_gen_jax.methods.hub_search import search
from lora_gen_jax.methods.lorahub import compose, loss_by_weights
from lora_gen_jax.methods.method import merge_if_possible
from lora_gen_jax.methods.registry import METHODS, make_generator
from lora_gen_jax.models import Pair


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

    def packed_prompt(self) -> Any:
        """The instruction in the shape in which `specialize` hands it to the compiled program."""
        layers = self.pair.edge.config.num_layers
        length = bucket(len(self.work.cloud_prompt) + layers)
        return pack_prompts([self.work.cloud_prompt], layers, 1, length)


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


def icl_kept_prefix(setup: Setup) -> Ready:
    """The instruction is read once; its keys and values are kept."""
    edge, work = setup.pair.edge, setup.work

    def read() -> Prefix:
        return encode_prefix(edge.plain, work.whole[: work.kept])

    model = edge.plain.replace(prefix=read())
    return setup.ready(work.whole[work.kept :], model, once=lambda: {"prefix": timed(lambda: read().cache)[1]})


def untrained(config: Config, pair: Pair) -> tuple[Any, Any]:
    """The module of the config's method with fresh variables: training changes no cost."""
    module = make_generator(config, pair)
    frozen = None if module.reader is None else pair.frozen[module.reader]
    return module, module.init(jax.random.key(0), frozen, None)


def fixed(key: str, setup: Setup) -> Ready:
    """A method whose adapter is the same for all tasks, so that none needs anything of its own.

    It is merged when the model is loaded, or stays beside its weights. Trained to read the prompt
    (`data.edge_reads_prompt`), the edge model reads it before every query.
    """
    config = dataclasses.replace(setup.config, method=key)
    module, variables = untrained(config, setup.pair)
    model = merge_if_possible(setup.pair.edge.plain, module.apply(variables, None, None).adapter)
    macs = METHODS[key].token_macs
    beside = 0 if model.adapter is None or macs is None else macs(setup.pair.edge.config, config)
    ids = setup.work.whole if config.data.edge_reads_prompt else setup.work.query
    return setup.ready(ids, model, adapter_macs=beside)


def autocompressor(setup: Setup) -> Ready:
    """The edge model compresses the instruction once; soft tokens stand before every query.

    Where the config is of another method, the instruction is one segment: it is shorter than those that the method's
    authors compress.
    """
    config = setup.config
    if config.method != "autocompressor":
        compressor = dataclasses.replace(config.compressor, segments=2)
        config = dataclasses.replace(config, method="autocompressor", compressor=compressor)
    module, variables = untrained(config, setup.pair)
    edge, prompt = setup.pair.edge, setup.work.whole[: setup.work.kept]
    model = merge_if_possible(edge.plain, module.apply(variables, None, None).adapter)

    def read() -> Prefix:
        soft_ND = compress(module, variables, edge.params, prompt)
        return encode_soft(model, soft_ND)

    answering = model.replace(prefix=read())
    return setup.ready(setup.work.query, answering, once=lambda: {"compress": timed(lambda: read().cache)[1]})


def lorahub(setup: Setup) -> Ready:
    """A search over the shots composes a LoRA, which is merged; the instruction's tokens stand for the shots."""
    config, work, edge = dataclasses.replace(setup.config, method="lorahub"), setup.work, setup.pair.edge
    module = make_generator(config, setup.pair)
    first = PackedPrompts(None, None, None, None, None, tasks_P=np.zeros(1, np.int32))
    variables = module.init(jax.random.key(0), None, first)
    scale, learned = config.generator.alpha / config.generator.rank, min(work.new_tokens, work.kept - 1)
    shots = work.whole[: work.kept]
    losses = loss_by_weights(edge, variables["params"], scale)

    def once() -> dict[str, float]:
        loss_of = losses([(shots[: -learned or None], shots[-learned:])])
        found, searching = timed(lambda: search(loss_of, config.hub.modules, config.hub))
        weights_N = np.float32(found.weights_N)
        _, merging = timed(lambda: merge(edge.params, compose(variables, weights_N, scale)))
        return {"search": searching, "merge": merging}

    merged = merge_if_possible(edge.plain, compose(variables, np.zeros(config.hub.modules, np.float32), scale))
    return setup.ready(work.query, merged, once=once)


def lora_gen(setup: Setup) -> Ready:
    """The cloud reads the instruction once; the merged edge model reads only the query."""
    params = setup.pair.edge.params

    def once() -> dict[str, float]:
        adapter, reading = timed(setup.specialize)
        _, merging = timed(lambda: merge(params, adapter))
        return {"cloud": reading, "merge": merging}

    return setup.ready(setup.work.query, merge_if_possible(setup.pair.edge.plain, setup.specialize()), once=once)


ANSWERING: dict[str, Callable[[Setup], Ready]] = {
    "base": lambda setup: setup.ready(setup.work.query, setup.pair.edge.plain),
    "icl": lambda setup: setup.ready(setup.work.whole, setup.pair.edge.plain),
    "icl_kept_prefix": icl_kept_prefix,
    **{key: functools.partial(fixed, key) for key, one in METHODS.items() if one.build and not one.depends_on_prompt},
    "lorahub": lorahub,
    "autocompressor": autocompressor,
    "lora_gen": lora_gen,
}
"""How each method is made ready to answer."""
