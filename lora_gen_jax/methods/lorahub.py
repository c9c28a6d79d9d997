"""LoraHub: LoRAs of single tasks, weighed for a new task by a search without gradients.

In: training: batches of N tasks, each of which trains a LoRA of its own (`LoRAModules`). For a new task: its shots.
Out: weights w that make the shots likely, and the edge model with one LoRA merged:

    Â = Σ_n w_n·A_n,   B̂ = Σ_n w_n·B_n,   ΔW = (α/r)·Â·B̂

The factors are summed, not the products, so ΔW has cross terms A_i·B_j. The edge model reads only queries.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_gen_jax.adapters.lora import LoRA, PromptLoRA, factor_a_init
from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.buckets import bucket
from lora_gen_jax.config import Config, DataConfig, GeneratorConfig, HubConfig
from lora_gen_jax.data.groups import Group
from lora_gen_jax.data.pipeline import Batch, pack_groups
from lora_gen_jax.data.tasks import Task, stable_hash
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.evaluation.timing import timed
from lora_gen_jax.generator.cloud import PackedPrompts
from lora_gen_jax.generator.trained_module import Generated, TrainedModule
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.methods.answering import Ready, Setup
from lora_gen_jax.methods.hub_search import Found, check_budget, require_nevergrad, search
from lora_gen_jax.methods.lora import SITES, lora_macs, lora_sites
from lora_gen_jax.methods.method import Method, Prompt, Specialize, Traits, merge_if_possible
from lora_gen_jax.models import Model, Pair
from lora_gen_jax.placement import mesh_context, mesh_of, padded_rows, place_rows
from lora_gen_jax.training.step import edge_loss

if TYPE_CHECKING:
    from lora_gen_jax.training.checkpoint import Loaded


Pairs = list[tuple[list[int], list[int]]]
"""Token ids of queries, each with those of its response."""


class LoRAModules(TrainedModule):
    """One LoRA a task, trained side by side; A Kaiming-uniform, B zero.

    Attributes:
        edge: of the model that carries the LoRAs.
        settings: rank, alpha, dropout and lora_sites.
        modules: N; task number n trains module n.
    """

    edge: DecoderConfig
    settings: GeneratorConfig
    modules: int

    @nn.compact
    def __call__(self, frozen: Any, prompts: PackedPrompts | None, train: bool = False) -> Generated:
        """A `PromptLoRA` with the module of each prompt's task; weights and prompts are not read.

        Raises:
            DataError: for prompts that do not say of which task they are.
        """
        if prompts is None or prompts.tasks_P is None:
            raise DataError(
                "method lorahub trains a module for each task",
                field="prompts.tasks_P",
                remedy="pack prompts with their tasks' numbers",
            )
        s, N, L, factors = self.settings, self.modules, self.edge.num_layers, {}
        tasks_P = jnp.asarray(prompts.tasks_P)
        for site in lora_sites(self.edge, s, SITES):
            inputs, outputs = self.edge.site_shape(site)
            a = self.param(f"{site}_a", factor_a_init, (N, L, inputs, s.rank))
            b = self.param(f"{site}_b", nn.initializers.zeros_init(), (N, L, s.rank, outputs))
            factors[site] = {"a": a[tasks_P].swapaxes(0, 1), "b": b[tasks_P].swapaxes(0, 1)}
        return Generated(PromptLoRA(factors, s.alpha / s.rank, s.dropout))


def choose_tasks(config: Config, tasks: list[Task]) -> list[Task]:
    """`hub.modules` of the tasks that have training rows, drawn by `train.seed`, in their order.

    Which ones depends only on the seed and on the tasks' names and sources.

    Raises:
        ConfigError: when there are too few.
    """
    having, count = [task for task in tasks if task.train], config.hub.modules
    if len(having) < count:
        raise ConfigError(
            f"hub.modules is {count}, but only {len(having)} tasks have training rows",
            field="hub.modules",
            remedy="lower hub.modules, or name more tasks with data.tasks or data.files",
        )
    salt = f"modules/{config.train.seed}"
    chosen = {id(task) for task in sorted(having, key=lambda t: stable_hash(salt, t.source, t.name))[:count]}
    return [task for task in having if id(task) in chosen]


def compose(variables: Any, weights_N: Any, scale: float) -> LoRA:
    """One LoRA of the weighted sums of the modules' factors.

    Args:
        variables: {"params": {site_a: [N, L, inputs, R], site_b: [N, L, R, outputs]}}.
        weights_N: w.
        scale: α/r.
    """
    factors: dict[str, dict[str, jax.Array]] = {}
    for name, factor_NLXY in variables["params"].items():
        site, part = name.rsplit("_", 1)
        summed = jnp.einsum("n,nlxy->lxy", weights_N, factor_NLXY, precision="highest")
        factors.setdefault(site, {})[part] = summed
    return LoRA(factors, scale)


def shots_of(edge: Model, prompt: Prompt | None) -> Pairs:
    """Ids of the shots' queries and responses, an end token behind each response.

    Raises:
        DataError: without shots, or for one that exceeds the model's positions.
    """
    if prompt is None or not prompt.shots:
        raise DataError(
            "there are no shots to learn from",
            field="eval.shots",
            remedy="set eval.shots to 1 or more",
        )
    pairs, end = [], [] if edge.encoder.end is None else [edge.encoder.end]
    for shot in prompt.shots:
        query, response = edge.encoder.query(shot, prompt.chat)
        pairs.append((query, [*response, *end]))
        if len(query) + len(response) > edge.config.max_positions:
            raise DataError(
                f"shot {shot.id} has {len(query) + len(response)} tokens, but the edge model has"
                f" {edge.config.max_positions} positions",
                field=shot.id,
                remedy="take other shots with eval.seed, or shorten the task's rows",
            )
    return pairs


def one_row(edge: Model, pairs: Pairs) -> Batch:
    """Queries and responses as training lays them out: one row, each a segment of its own.

    Lengths are bucketed, so that tasks share compilations; a mesh of devices gets rows of padding beside the one.
    """
    shapes = DataConfig(
        edge_length=bucket(sum(len(query) + len(response) - 1 for query, response in pairs)),
        response_slots=bucket(sum(len(response) for _, response in pairs)),
        cloud_length=1,
        prompts_per_row=1,
    )
    rows = padded_rows(1, edge.params)
    groups = [Group("", (), [0], pairs if row == 0 else []) for row in range(rows)]
    return place_rows(pack_groups(groups, shapes, 0).replace(prompts=None), edge.params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(decoder: Decoder, scale: float, frozen: Any, modules: Any, weights_N: jax.Array, batch: Batch) -> jax.Array:
    return edge_loss(decoder, frozen, compose({"params": modules}, weights_N, scale), batch, {})


def loss_by_weights(edge: Model, modules: Any, scale: float) -> Callable[[Pairs], Callable[[np.ndarray], float]]:
    """From queries with responses to a function from weights to their loss, in nats a token of the responses.

    Args:
        edge: the model.
        modules: their parameters.
        scale: α/r.
    """
    mesh = mesh_of(edge.params)
    modules = jax.device_put(modules, None if mesh is None else NamedSharding(mesh, PartitionSpec()))

    def of_pairs(pairs: Pairs) -> Callable[[np.ndarray], float]:
        batch = one_row(edge, pairs)

        def loss_of(weights_N: np.ndarray) -> float:
            with mesh_context(edge.params):
                return float(_loss(edge.decoder, scale, edge.params, modules, np.float32(weights_N), batch))

        return loss_of

    return of_pairs


def shots_loss(edge: Model, loaded: "Loaded") -> Callable[[Prompt | None], Callable[[np.ndarray], float]]:
    """From a task's prompt to a function from weights to the loss of its shots, in nats a token of the answers."""
    scale = loaded.config.generator.alpha / loaded.config.generator.rank
    of_pairs = loss_by_weights(edge, loaded.variables["params"], scale)
    return lambda prompt: of_pairs(shots_of(edge, prompt))


def found_weights(hub: HubConfig, pair: Pair, loaded: "Loaded") -> Callable[[Prompt | None], Found]:
    """From a task's prompt to the weights that the search finds for it, with the budget, bound and penalty of `hub`."""
    losses = shots_loss(pair.edge, loaded)

    def find(prompt: Prompt | None) -> Found:
        loss_of = losses(prompt)
        assert prompt is not None, "without shots there is no loss"
        return search(loss_of, loaded.config.hub.modules, hub, len(prompt.shots))

    return find


def check(config: Config) -> None:
    """What the search after training needs."""
    check_budget(config.hub, config.hub.modules)
    require_nevergrad()


def build(config: Config, pair: Pair) -> LoRAModules:
    """The modules of a config."""
    check(config)
    return LoRAModules(pair.edge.config, config.generator, config.hub.modules)


def specialize(config: Config, pair: Pair, loaded: "Loaded | None") -> Specialize:
    """From a prompt to the edge model with the LoRA merged that a search over its shots composes."""
    assert loaded is not None, "modules are trained"
    find, scale = found_weights(config.hub, pair, loaded), loaded.config.generator.alpha / loaded.config.generator.rank

    def specialized(prompt: Prompt | None) -> EdgeModel:
        adapter = compose(loaded.variables, np.float32(find(prompt).weights_N), scale)
        return merge_if_possible(pair.edge.plain, adapter)

    return specialized


def ready(setup: Setup) -> Ready:
    """A search over the shots composes a LoRA, which is merged; the instruction's tokens stand for the shots."""
    config, work, edge = setup.config, setup.work, setup.pair.edge
    module = build(config, setup.pair)
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


METHOD = Method(
    key="lorahub",
    title="LoraHub",
    # The shots reach the edge model through its weights; every new task needs a search of hub.budget forward passes.
    traits=Traits(compresses_context=True, merged=True, training_free=False, transfers=False),
    build=build,
    specialize=specialize,
    depends_on_prompt=True,
    needs_shots=True,
    token_macs=lambda edge, config: lora_macs(edge, config.generator),
    check=check,
    choose_tasks=choose_tasks,
    packages=("nevergrad", "scipy"),
    ready=ready,
    # One for each of the five seen tasks; its authors draw 20 of about two hundred.
    published={"hub": {"modules": 5}},
)
