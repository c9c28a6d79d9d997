"""Refining: a few steps on a prompt's own examples, of its gates, of factors beside its generated update, or of both.

In: what the generator said about P prompts, and the token ids of each prompt's examples. Out: `Refined`: better gates,
or factors. All prompts take their steps together, by one compiled program for each shape of rows; no prompt's steps
depend on the others'. Edge model and expert pool are read only.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.lora import factor_a_init
from lora_gen_jax.adapters.refined import RefinedPool
from lora_gen_jax.config import GeneratorConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.generator.router import Gates, Routing, gates_of, straight_through
from lora_gen_jax.generator.trained_module import Generated
from lora_gen_jax.placement import mesh_context, padded_rows, place_rows
from lora_gen_jax.specialization.rows import ExampleIds, ExampleRows, check_examples, pack_examples
from lora_gen_jax.specialization.settings import RefineConfig
from lora_gen_jax.training.losses import slot_cross_entropy

Fixed = tuple[Any, ExampleRows]
"""The adapter of V prompts, and their rows."""
FACTOR_SCALE = 8.0
"""α/r of factors while they are trained; what is kept has it multiplied into A."""
PATIENCE = 4
"""Steps without a lower held-out loss after which a prompt is done."""


class Form(NamedTuple):
    """What decides about the program, beside shapes.

    Attributes:
        kind: of `RefineConfig`.
        routing, top_k, temperature: from trained values to gates.
        variants: U.
        judged: examples are held out.
    """

    kind: str
    routing: Routing
    top_k: int
    temperature: float
    variants: int
    judged: bool


class State(struct.PyTreeNode):
    """What the steps change. V = P·U variants; all values have the axes [L, V, …].

    Attributes:
        value: {"gates": [L, V, E]}, what gates are made of; or {site: {"a", "b"}}.
        start: what it was at first.
        moments: Adam's.
        best: the kept variant's value, [L, P, …], at the step that counts; None where none is held out.
        best_P, chosen_P, after_P: held-out loss, number and training loss of that step.
        before_P: training loss at the start.
        step: taken so far.
    """

    value: Any
    start: Any
    moments: Any
    best: Any
    best_P: jax.Array
    chosen_P: jax.Array
    after_P: jax.Array
    before_P: jax.Array
    step: jax.Array


class Refined(struct.PyTreeNode):
    """What refining gives for P prompts.

    Attributes:
        adapter: with what was learned, for `merge`, `generate` and `score` after `select(p)`.
        gates: [P, L, K], its own; those it began with, where only factors were learned.
        factors: {site: {"a": [L, P, inputs, X], "b": [L, P, X, outputs]}}; None where gates were learned and there
            were none before.
        steps_P: steps that count.
        before_P, after_P: mean cross-entropy in nats a token of the answers learned from, at the start and at the end.
        held_P: the same of those held out, at the end; NaN for a prompt of which none is, None where none is at all.
    """

    adapter: Any
    gates: Gates
    factors: Any
    steps_P: np.ndarray
    before_P: np.ndarray
    after_P: np.ndarray
    held_P: np.ndarray | None


def refine(
    decoder: Decoder,
    params: Any,
    generated: Generated,
    examples: Sequence[Sequence[ExampleIds]],
    settings: GeneratorConfig,
    config: RefineConfig,
) -> Refined:
    """Takes up to `config.most_steps` steps for every prompt.

    Args:
        decoder, params: the edge model.
        generated: of P prompts: the adapter (`GatedPool` or `RefinedPool`), and the router's logits for gates.
        examples: of each prompt, the token ids of queries and answers; an answer ends with the end token.
        settings: of the generator.
        config: what is trained, and how far.

    Raises:
        ConfigError: for a generator without gates.
        DataError: as `check_examples`, or for another number of prompts than the adapter's.
    """
    if len(config.stages) > 1:
        gates, factors = config.stages
        first = refine(decoder, params, generated, examples, settings, gates)
        then = refine(decoder, params, generated.replace(adapter=first.adapter), examples, settings, factors)
        return then.replace(before_P=first.before_P, steps_P=first.steps_P + then.steps_P)
    adapter = generated.adapter
    if not isinstance(adapter, GatedPool | RefinedPool):
        raise ConfigError(
            "this generator makes factors directly: only a specialization with gates can be refined", field="generator"
        )
    count = adapter.prompts
    if len(examples) != count:
        raise DataError(
            f"there are examples of {len(examples)} prompts and {count} specializations",
            field="examples",
            remedy="give as many",
        )
    check_examples(examples, decoder.config.vocab_size, decoder.config.max_positions)
    P = padded_rows(count, params)
    index = np.concatenate([np.arange(count), np.zeros(P - count, np.int64)])
    rows, U = pack_examples(examples, P, config)
    judged = bool(np.any(rows.held_BS))
    form = Form(config.kind, settings.routing, settings.top_k, settings.temperature, U, judged)
    start = _start(adapter.take(index), generated, index, config)
    # Factors that are trained stand in the state.
    beside = adapter.generated if config.kind == "lora" and isinstance(adapter, RefinedPool) else adapter
    fixed = beside.take(np.repeat(index, U)), place_rows(rows, params)
    with mesh_context(params):
        state = _steps(decoder, params, form, fixed, (start, count), config)
    return _refined(adapter, form, state, count)


def _start(adapter: Any, generated: Generated, index: np.ndarray, config: RefineConfig) -> Any:
    """The values that training begins with, [L, P, …]."""
    if config.kind == "lora":
        return _start_factors(adapter, config.rank)
    values_PLE = generated.logits_PLE
    if values_PLE is None:
        raise ConfigError(
            "refining gates starts from the router's logits",
            field="generated.logits_PLE",
            remedy="pass what the generator gave, with them",
        )
    return {"gates": jnp.asarray(values_PLE, float)[index].transpose(1, 0, 2)}


def _start_factors(adapter: Any, rank: int) -> dict[str, dict[str, jax.Array]]:
    """Factors that are there already, or new ones: A random, the same for all prompts, and B zero."""
    if isinstance(adapter, RefinedPool):
        there = adapter.scanned["factors"]
        return {site: {"a": pair["a"] / FACTOR_SCALE, "b": pair["b"]} for site, pair in there.items()}
    L, P, _ = adapter.gates.shape
    factors = {}
    for number, (site, pair) in enumerate(sorted(adapter.pool.items())):
        inputs, outputs = pair["a"].shape[-2], pair["b"].shape[-1]
        a = factor_a_init(jax.random.fold_in(jax.random.key(0), number), (L, inputs, rank))
        a = jnp.broadcast_to(a[:, None], (L, P, inputs, rank))
        factors[site] = {"a": a, "b": jnp.zeros((L, P, rank, outputs), float)}
    return factors


def _steps(
    decoder: Decoder, params: Any, form: Form, fixed: Fixed, begin: tuple[Any, int], config: RefineConfig
) -> State:
    """The state after the last step, judged. `begin` is what training begins with, and of how many prompts it is."""
    start, count = begin
    state, rates = _initial(form, start), (np.float32(config.rate), np.float32(config.pull))
    for step in range(config.most_steps):
        state = _step(decoder, form, params, fixed, state, rates)
        if form.judged and step >= PATIENCE and bool(np.all(_done(state)[:count])):
            return state
    return _judge(decoder, form, params, fixed, state)


@functools.partial(jax.jit, static_argnums=0)
def _initial(form: Form, start: Any) -> State:
    value = jax.tree.map(lambda x: jnp.repeat(x, form.variants, axis=1), start)
    P = jax.tree.leaves(start)[0].shape[1]
    infinite_P, zeros_P = jnp.full(P, jnp.inf), jnp.zeros(P)
    return State(
        value=value,
        start=value,
        moments=_adam().init(value),
        best=start if form.judged else None,
        best_P=infinite_P,
        chosen_P=jnp.zeros(P, jnp.int32),
        after_P=zeros_P,
        before_P=zeros_P,
        step=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(decoder: Decoder, form: Form, params: Any, fixed: Fixed, state: State, rates: Any) -> State:
    """Looks at the losses of the present values, and takes a step."""
    rate, pull = rates
    grad_fn = jax.grad(_objective, argnums=0, has_aux=True)
    gradients, losses = grad_fn(state.value, decoder, form, params, fixed)
    state = _noted(form, state, losses)
    # Optax mixes Python and array scalars in ways that strict promotion rejects.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = _adam().update(gradients, state.moments)

    def moved(x: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
        return x - rate * (update + pull * (x - start))

    value = jax.tree.map(moved, state.value, updates, state.start)
    return state.replace(value=value, moments=moments, step=state.step + 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _judge(decoder: Decoder, form: Form, params: Any, fixed: Fixed, state: State) -> State:
    """Looks at the losses of the present values."""
    return _noted(form, state, _objective(state.value, decoder, form, params, fixed)[1])


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam()


def _objective(value: Any, decoder: Decoder, form: Form, params: Any, fixed: Fixed):
    """(the sum over variants of their training losses, (training loss, held-out loss and tokens) of each)."""
    adapter, rows = fixed
    V = adapter.prompts
    hidden_BTD, _ = decoder.apply(
        {"params": params},
        rows.tokens_BT,
        rows.positions_BT,
        segments_BT=rows.segments_BT,
        packed=True,
        adapter=_learning(adapter, value, form),
    )
    hidden_BSD = jnp.take_along_axis(hidden_BTD, rows.source_BS[:, :, None], axis=1)
    loss_BS = slot_cross_entropy(decoder, params, hidden_BSD, rows.target_BS)
    train_V, tokens_V = (jnp.sum(x.reshape(V, -1), axis=1) for x in (loss_BS * rows.train_BS, rows.train_BS))
    held_V, held_tokens_V = (jnp.sum(x.reshape(V, -1), axis=1) for x in (loss_BS * rows.held_BS, rows.held_BS))
    mean_V = train_V / jnp.maximum(tokens_V, 1.0)
    return jnp.sum(mean_V), (mean_V, held_V, held_tokens_V)


def _learning(adapter: Any, value: Any, form: Form) -> Any:
    """`with_values` while it learns: the same outputs, and gradients for the experts that are not chosen, too."""
    if form.kind == "lora":
        return with_values(adapter, value, form)
    return adapter.with_gates(straight_through(value["gates"], form.routing, form.top_k, form.temperature))


def with_values(adapter: Any, value: Any, form: Form) -> Any:
    """An adapter with trained values [L, V, …] in the place of those that it has."""
    if form.kind == "lora":
        pool = adapter.generated if isinstance(adapter, RefinedPool) else adapter
        return RefinedPool.of(pool, kept_factors(value))
    return adapter.with_gates(gates_of(value["gates"], form.routing, form.top_k, form.temperature))


def kept_factors(value: Any) -> Any:
    """Trained factors with their scale multiplied into A."""
    return {site: {"a": pair["a"] * FACTOR_SCALE, "b": pair["b"]} for site, pair in value.items()}


def _noted(form: Form, state: State, losses: tuple[jax.Array, jax.Array, jax.Array]) -> State:
    """The state with the losses of its present values taken into account."""
    mean_V, held_V, tokens_V = losses
    U, step = form.variants, state.step
    mean_P = mean_V[::U]
    before_P = jnp.where(step == 0, mean_P, state.before_P)
    if not form.judged:
        return state.replace(before_P=before_P, after_P=mean_P, chosen_P=jnp.full_like(state.chosen_P, step))
    held_P, tokens_P = (jnp.sum(x.reshape(-1, U), axis=1) for x in (held_V, tokens_V))
    held_P = held_P / tokens_P
    # Where nothing is held out (a single example), the last step counts.
    better_P = ((held_P < state.best_P) & ~_done(state)) | (tokens_P == 0)

    def better(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(better_P.reshape(1, -1, *(1,) * (new.ndim - 2)), new[:, ::U], old)

    return state.replace(
        best=jax.tree.map(better, state.best, state.value),
        best_P=jnp.where(better_P, held_P, state.best_P),
        chosen_P=jnp.where(better_P, step, state.chosen_P),
        after_P=jnp.where(better_P, mean_P, state.after_P),
        before_P=before_P,
    )


def _done(state: State) -> jax.Array:
    """Prompts whose held-out loss has not been lower for a while: later steps count no more, alone or in a batch."""
    return state.step - state.chosen_P > PATIENCE


def _refined(adapter: Any, form: Form, state: State, count: int) -> Refined:
    kept = state.best if form.judged else jax.tree.map(lambda x: x[:, :: form.variants], state.value)
    refined = with_values(adapter, jax.tree.map(lambda x: x[:, :count], kept), form)
    pool = refined.generated if isinstance(refined, RefinedPool) else refined
    return Refined(
        adapter=refined,
        gates=jax.tree.map(np.asarray, pool.gates.by_layer()),
        factors=refined.scanned["factors"] if isinstance(refined, RefinedPool) else None,
        steps_P=np.asarray(state.chosen_P)[:count],
        before_P=np.asarray(state.before_P)[:count],
        after_P=np.asarray(state.after_P)[:count],
        held_P=np.asarray(state.best_P)[:count] if form.judged else None,
    )
