"""What a method is to the rest of the program: how it is trained, and what answers a task's queries.

In: a config, a pair of models and, for methods that learn, a checkpoint. Out: the module to train, and a function from
a task's prompt to the `EdgeModel` that answers. Each method's file ends with its `Method`; `registry.py` lists them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import Config
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.quantized import quantized_name
from lora_gen_jax.generator.trained_module import TrainedModule
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.methods.answering import Ready, Setup, untrained
from lora_gen_jax.models import Pair, check_variables

if TYPE_CHECKING:
    from lora_gen_jax.training.checkpoint import Loaded


@dataclasses.dataclass(frozen=True)
class Traits:
    """The columns of the paper's Table 1.

    Attributes:
        compresses_context: what the prompt says reaches the edge model in fewer tokens than the prompt has, or in none.
        merged: nothing stays beside the edge model's weights: no extra parameters, no extra work for a token.
        training_free: a new task needs no gradient step and no search.
        transfers: what a larger model knows of the task reaches the edge model.
    """

    compresses_context: bool
    merged: bool
    training_free: bool
    transfers: bool


class Prompt(NamedTuple):
    """A task's system prompt.

    Attributes:
        text: description and shots as one text.
        shots: the shots.
        chat: queries are turns of a conversation.
        queries: further training rows, for methods that ask the prompted model something.
    """

    text: str
    shots: tuple[Example, ...]
    chat: bool
    queries: tuple[Example, ...] = ()


Specialize = Callable[[Prompt | None], EdgeModel]
"""From a task's prompt, None where it has none, to what answers its queries."""
Build = Callable[[Config, Pair], TrainedModule]
"""From the config of a run and its models to the module that is trained."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One of the systems that are compared.

    Attributes:
        key: in configs and results.
        title: in the paper's tables.
        label: in reports and figures; the title where it is empty.
        traits: for Table 1.
        build: makes the module that training trains; None where nothing is trained.
        specialize: makes the function from prompts to models; it may be slow, what it gives is called once a task.
        edge_reads_prompt: the edge model reads the prompt before every query.
        may_read_prompt: it may do so, in training and when it is scored, where `data.edge_reads_prompt` says so.
        depends_on_prompt: what answers differs from prompt to prompt.
        needs_shots: a prompt's text is not enough for it.
        settings: what of the evaluation's settings `specialize` depends on, as JSON holds it.
        checkpoint: the method whose trained weights it starts from, where they are not its own.
        token_macs: multiply-adds of the adapter's side path for one token, over all layers, where that is all that a
            method adds.
        check: what training needs and the config and the machine may lack: raises ConfigError.
        choose_tasks: which of the tasks that a config names the method is trained on; left out, all.
        soft_tokens: how many stand before every query, by the config of the run.
        packages: beside those of every run, whose versions decide what `specialize` gives.
        edge_prompts: the prompt is laid out in the edge model's ids, too (`data.edge_prompt_length`).
        ready: makes it ready to answer, so that its cost can be measured; a method whose adapter is the same for every
            prompt needs none of its own.
        published: what its authors, or the paper, set in a config; None for one without a row in the paper's tables.
    """

    key: str
    title: str
    traits: Traits
    build: Build | None
    specialize: Callable[[Config, Pair, "Loaded | None"], Specialize]
    edge_reads_prompt: bool = False
    may_read_prompt: bool = False
    depends_on_prompt: bool = False
    needs_shots: bool = False
    settings: Callable[[Config], Any] = lambda config: None
    checkpoint: str | None = None
    token_macs: Callable[[DecoderConfig, Config], int] | None = None
    check: Callable[[Config], None] = lambda config: None
    choose_tasks: Callable[[Config, list[Task]], list[Task]] | None = None
    soft_tokens: Callable[[Config], int] = lambda config: 0
    packages: tuple[str, ...] = ()
    edge_prompts: bool = False
    ready: Callable[[Setup], Ready] | None = None
    published: Mapping[str, Any] | None = None
    label: str = ""

    @property
    def answering(self) -> Callable[[Setup], Ready] | None:
        """`ready`, or that of any method with a fixed adapter; None where the cost cannot be measured."""
        if self.ready is not None or self.build is None or self.depends_on_prompt:
            return self.ready
        return functools.partial(fixed_ready, self)


def base(config: Config, pair: Pair, loaded: "Loaded | None" = None) -> Specialize:
    """The edge model as it is."""
    return lambda prompt: pair.edge.plain


def fixed(build: Build) -> Callable[[Config, Pair, "Loaded | None"], Specialize]:
    """For a method whose adapter is the same for every prompt: it is made once, when it is first needed."""

    def specialize(config: Config, pair: Pair, loaded: "Loaded | None") -> Specialize:
        assert loaded is not None

        @functools.cache
        def made() -> EdgeModel:
            module: Any = build(loaded.config, pair)
            check_variables(loaded, module, pair, reads=False)
            adapter = module.apply(loaded.variables, None, None).adapter
            return merge_if_possible(pair.edge.plain, jax.device_put(adapter))

        return lambda prompt: made()

    return specialize


def merge_if_possible(model: EdgeModel, adapter: Any) -> EdgeModel:
    """The model with the adapter merged, where it is a change of weights; beside them, where not, or if quantized."""
    if hasattr(adapter, "weight_delta") and quantized_name(model.params) is None:
        return model.replace(params=merge(model.params, adapter))
    return model.replace(adapter=adapter)


def fixed_ready(method: Method, setup: Setup) -> Ready:
    """A method whose adapter is the same for all tasks, so that none needs anything of its own.

    It is merged when the model is loaded, or stays beside its weights. Trained to read the prompt
    (`data.edge_reads_prompt`), the edge model reads it before every query.
    """
    assert method.build is not None
    config, pair = dataclasses.replace(setup.config, method=method.key), setup.pair
    module: Any = method.build(config, pair)
    model = merge_if_possible(pair.edge.plain, module.apply(untrained(module, pair), None, None).adapter)
    macs = method.token_macs
    beside = 0 if model.adapter is None or macs is None else macs(pair.edge.config, config)
    ids = setup.work.whole if config.data.edge_reads_prompt else setup.work.query
    return setup.ready(ids, model, adapter_macs=beside)
