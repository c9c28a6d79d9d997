"""Refining specializations of one generator: what was read of each prompt, and its examples, to better ones.

In: `Before`s. Out: `Specialization`s that say how they were refined. Prompts whose rows are of one length go together.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.refined import RefinedPool
from lora_gen_jax.adapters.specialization import Specialization, gate_tensors
from lora_gen_jax.buckets import power_of_two
from lora_gen_jax.config import GeneratorConfig, ModelConfig
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.trained_module import Generated
from lora_gen_jax.models import Model, make_decoder
from lora_gen_jax.specialization.refine import Refined, refine
from lora_gen_jax.specialization.rows import ExampleIds, check_examples, lengths_of, row_length, variants
from lora_gen_jax.specialization.settings import RefineConfig

TOKENS_AT_ONCE = 4096
"""Tokens that one step computes, padding included, but for a prompt that needs more alone."""


class Before(NamedTuple):
    """One prompt.

    Attributes:
        specialization: as it was read, or refined earlier.
        logits_LE: what its gates are made of, for a refinement of gates.
        pairs: token ids of its examples.
    """

    specialization: Specialization
    logits_LE: np.ndarray | None
    pairs: list[ExampleIds]


def learning_model(edge: Model, settings: ModelConfig) -> Model:
    """The edge model as it learns fastest on this machine, with weights of its own where they are rounded.

    As in training: where dtype is auto and the processor multiplies bfloat16 in hardware, large products take operands
    of that type and sum in float32.
    """
    decoder = make_decoder(settings, edge.config, jax.default_backend(), training=True)
    if decoder.operands is None or edge.decoder.operands is not None or edge.params is None:
        return edge

    def stored(path: Any, x: jax.Array) -> jax.Array:
        matrix = path[-1].key in ("kernel", "embedding") and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(decoder.operands) if matrix else x

    params = jax.tree_util.tree_map_with_path(stored, edge.params)
    return dataclasses.replace(edge, decoder=decoder, params=params)


def check_refinable(edge: Model, settings: GeneratorConfig, pairs: Sequence[Sequence[ExampleIds]]) -> None:
    """What can be said before a prompt is read.

    Raises:
        ConfigError: for a generator without gates, or an edge model without its weights.
        DataError: as `check_examples`.
    """
    if settings.generator == "direct":
        raise ConfigError(
            "this generator makes factors directly: only a specialization with gates can be refined", field="generator"
        )
    if edge.params is None:
        raise ConfigError(
            "refining needs the edge model's weights",
            field="edge_weights",
            remedy="load the Specializer with edge_weights=True",
        )
    check_examples(pairs, edge.config.vocab_size, edge.config.max_positions)


def refine_all(
    edge: Model,
    pool: GatedPool,
    settings: GeneratorConfig,
    before: Sequence[Before],
    config: RefineConfig,
    progress: Callable[[int, int], None] | None = None,
) -> list[Specialization]:
    """Refines every specialization on its examples.

    Args:
        edge: with its weights.
        pool: the generator's; its gates do not matter.
        settings: the generator's.
        before: as many as there are.
        config: what is trained, and how far.
        progress: called with the number of prompts done and their total, after every batch.
    """
    check_refinable(edge, settings, [one.pairs for one in before])
    made: dict[int, Specialization] = {}
    for chunk in _chunks(before, config):
        some = [before[i] for i in chunk]
        generated = _generated(pool, settings, some)
        pairs = [one.pairs for one in some]
        refined = refine(edge.decoder, edge.params, generated, pairs, settings, config)
        for row, i in enumerate(chunk):
            made[i] = _specialization(before[i], refined, row, settings, config)
        if progress is not None:
            progress(len(made), len(before))
    return [made[i] for i in range(len(before))]


def logits_of(gates_LE: np.ndarray, read_LE: np.ndarray | None, settings: GeneratorConfig) -> np.ndarray:
    """Logits [L, E] whose gates are these.

    Args:
        gates_LE: stored ones.
        read_LE: what the router says about the prompt, for the experts that are not chosen; needed where few are.
        settings: of the generator.
    """
    if settings.routing == "linear":
        return gates_LE * np.float32(gates_LE.shape[1] ** 0.5)
    temperature = np.float32(settings.temperature)
    chosen_LE = gates_LE > 0
    log_LE = np.log(gates_LE, where=chosen_LE, out=np.full_like(gates_LE, -np.inf))
    if settings.active_experts == settings.num_experts:
        return np.maximum(log_LE, np.float32(-100.0)) * temperature
    assert read_LE is not None
    read_LE = read_LE / temperature
    outside_LE = np.where(chosen_LE, -np.inf, read_LE)
    if settings.top_k == 1:  # a single gate is its probability among all
        others_L1 = np.logaddexp.reduce(outside_LE, axis=1, keepdims=True)
        own_LE = log_LE - np.log1p(-np.minimum(gates_LE, np.float32(1 - 1e-7))) + others_L1
    else:
        inside_L1 = np.logaddexp.reduce(np.where(chosen_LE, read_LE, -np.inf), axis=1, keepdims=True)
        least_L1 = np.where(chosen_LE, log_LE, np.inf).min(axis=1, keepdims=True)
        # As read, or as far above the experts that were not chosen as the choice needs.
        own_LE = log_LE + np.maximum(inside_L1, outside_LE.max(axis=1, keepdims=True) - least_L1 + np.float32(0.01))
    return (np.where(chosen_LE, own_LE, read_LE) * temperature).astype(np.float32)


def _chunks(before: Sequence[Before], config: RefineConfig) -> list[list[int]]:
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i, (specialization, _, pairs) in enumerate(before):
        rank = next((pair["a"].shape[-1] for pair in specialization.factors.values()), 0)
        groups.setdefault((row_length([pairs]), rank, specialization.active), []).append(i)
    chunks = []
    for (length, *_), group in sorted(groups.items()):
        cost = max(_rows(before[i].pairs, length, config) for i in group) * length
        size = power_of_two(max(1, TOKENS_AT_ONCE // cost) + 1) // 2
        chunks += [group[start : start + size] for start in range(0, len(group), size)]
    return chunks


def _rows(pairs: Sequence[ExampleIds], length: int, config: RefineConfig) -> int:
    return len(variants(len(pairs), config)) * power_of_two(-(-sum(lengths_of(pairs)) // length))


def _generated(pool: GatedPool, settings: GeneratorConfig, some: Sequence[Before]) -> Generated:
    each = [one.specialization.gates(settings.num_experts) for one in some]
    gates = jax.tree.map(lambda *x: np.stack(x), *each)
    adapter: Any = pool.with_gates(jax.tree.map(jnp.asarray, gates.by_layer()))
    if some[0].specialization.factors:
        factors = [one.specialization.factors for one in some]
        stacked = {
            site: {x: jnp.asarray(np.stack([each[site][x] for each in factors], axis=1)) for x in pair}
            for site, pair in factors[0].items()
        }
        adapter = RefinedPool.of(adapter, stacked)
    logits = [one.logits_LE for one in some if one.logits_LE is not None]
    return Generated(adapter, gates, np.stack(logits) if logits else None)


def _specialization(
    before: Before, refined: Refined, row: int, settings: GeneratorConfig, config: RefineConfig
) -> Specialization:
    old, steps = before.specialization, int(refined.steps_P[row])
    tensors, learned = old.tensors, {}
    if config.trains_factors:
        learned = {
            f"{site}.{x}": np.ascontiguousarray(np.asarray(value)[:, row])
            for site, pair in refined.factors.items()
            for x, value in pair.items()
        }
    gates = jax.tree.map(lambda x: x[row], refined.gates)
    if not all(np.isfinite(x).all() for x in (gates.weight, *learned.values())):
        raise ConfigError(
            f"refining diverged within {steps} steps",
            field="refine.learning_rate",
            remedy=f"lower the learning rate, which is {config.rate:g}",
        )
    if steps > 0:
        own = gate_tensors(gates, settings) if config.trains_gates else {}
        tensors = {**tensors, **own, **learned}
    record = {
        "kind": config.kind,
        "examples": len(before.pairs),
        "steps": steps,
        "loss_before": round(float(refined.before_P[row]), 5),
        "loss_after": round(float(refined.after_P[row]), 5),
    }
    return dataclasses.replace(old, tensors=tensors, refined=record)
