"""Sequences that come and go in one batch, each with its own specialization: the same as each merged model alone."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import SAME, raises
from inference_models import CONFIGS, make_gates, make_model

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.adapters.refined import RefinedPool
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.generator.router import Gates
from lora_gen_jax.inference.continuous import decode, join
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.engine import Engine
from lora_gen_jax.inference.mixture import answer_all, mixed_is_better
from lora_gen_jax.inference.sampling import Sampling
from lora_gen_jax.inference.work import GenerationRequest
from lora_gen_jax.sharding import make_mesh, param_shardings

pytestmark = pytest.mark.float64
SLOTS = 28


def run(engine, works):
    found = {}
    engine.run(works, found.__setitem__)
    assert engine.busy == 0
    return [found[i] for i in range(len(works))]


def offline(model, adapter, work):
    """The same by merged weights, alone."""
    params = model.params
    if work.gates is not None:
        own = adapter.with_gates(jax.tree.map(lambda x: jax.numpy.asarray(x)[:, None], work.gates))
        if work.factors:
            own = RefinedPool.of(own, jax.tree.map(lambda x: jax.numpy.asarray(x)[:, None], work.factors))
        params = merge(params, own)
    return generate(
        EdgeModel(model.decoder, params),
        [work.ids],
        work.settings,
    )[0]


def settings(max_new_tokens, stop_ids=(), seed=0, **sampling):
    return GenerationSettings(max_new_tokens, stop_ids, Sampling(**sampling), seed)


def make_works(config, adapter, count, **options):
    """Works of many lengths; every fourth is for the base model. Options take turns."""
    rng, prompts = np.random.default_rng(3), adapter.prompts
    gates = [jax.tree.map(lambda x, p=p: np.asarray(x)[:, p], adapter.gates) for p in range(prompts)]
    return [
        GenerationRequest(
            ids=rng.integers(2, config.vocab_size, int(rng.integers(1, 16))).tolist(),
            settings=settings(
                max_new_tokens=int(rng.integers(1, 10)),
                stop_ids=range(3, 67, 8),
                **{name: values[i % len(values)] for name, values in options.items()},
            ),
            gates=None if i % 4 == 3 else gates[i % prompts],
        )
        for i in range(count)
    ]


def assert_same(found, expected):
    for got, wanted in zip(found, expected, strict=True):
        assert got.ids == wanted.ids
        assert got.finish == wanted.finish
        np.testing.assert_allclose(got.logprobs, wanted.logprobs, **SAME)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_rows_answer_as_their_merged_models_do(family):
    model = make_model(CONFIGS[family])
    adapter = make_gates(model.decoder.config, prompts=5)
    works = make_works(model.decoder.config, adapter, 48)
    found = run(Engine(model.edge(adapter), rows=3, slots=SLOTS), works)
    assert_same(found, [offline(model, adapter, work) for work in works])
    assert len({tuple(got.ids) for got in found}) > 20
    # The clock went round.
    assert sum(len(got.ids) - 1 for got in found) > 3 * SLOTS


@pytest.mark.parametrize("variant", ["factors", "per_layer"])
def test_pools_of_every_kind_are_served(llama, variant):
    adapter = make_gates(llama.decoder.config, prompts=5)
    if variant == "factors":
        adapter = dataclasses.replace(adapter, mix="factors")
    else:
        rng = np.random.default_rng(1)
        pool = jax.tree.map(
            lambda x: x[None] * (1 + rng.standard_normal((2, *[1] * x.ndim), np.float32)), adapter.shared["pool"]
        )
        adapter = dataclasses.replace(adapter, scanned=adapter.scanned | {"pool": pool}, shared=None)
    works = make_works(llama.decoder.config, adapter, 6)
    assert_same(
        run(Engine(llama.edge(adapter), rows=3, slots=SLOTS), works), [offline(llama, adapter, w) for w in works]
    )


def test_draws_are_those_of_generate_whatever_the_neighbours_draw(llama):
    adapter = make_gates(llama.decoder.config, prompts=5)
    options = {"temperature": (0.0, 1.0, 0.8), "top_k": (0, 20), "top_p": (1.0, 0.9), "seed": (0, 5, 2**32 - 1)}
    works = make_works(llama.decoder.config, adapter, 12, **options)
    found = run(Engine(llama.edge(adapter), rows=3, slots=SLOTS), works)
    assert_same(found, [offline(llama, adapter, work) for work in works])
    assert {got.finish for got in found} == {"stop", "length"}


def test_a_cancelled_row_is_free_and_leaves_nothing_behind(llama):
    adapter = make_gates(llama.decoder.config, prompts=5)
    works = make_works(llama.decoder.config, adapter, 12)
    engine = Engine(llama.edge(adapter), rows=3, slots=SLOTS)
    rows, _ = engine.admit([dataclasses.replace(work, settings=settings(9)) for work in works[:3]])
    engine.step()
    for row in rows:
        engine.cancel(row)
    assert sorted(engine.free) == [0, 1, 2]
    assert_same(run(engine, works), [offline(llama, adapter, work) for work in works])


@pytest.mark.parametrize("how", ["mixed", "merged"])
def test_many_queries_are_answered_alike_mixed_and_merged(llama, how):
    adapter = make_gates(llama.decoder.config, prompts=5)
    works, seen = make_works(llama.decoder.config, adapter, 12), []
    before = jax.tree.map(lambda x: np.array(x, copy=True), llama.params)
    found = answer_all(llama.edge(adapter), works, rows=3, how=how, progress=lambda *done: seen.append(done))
    assert_same(found, [offline(llama, adapter, work) for work in works])
    assert seen == [(i + 1, 12) for i in range(12)]
    jax.tree.map(np.testing.assert_array_equal, llama.params, before)


def with_factors(config, works, ranks=(0, 2, 3)):
    """The works, those with gates with factors of these ranks beside them."""
    rng, made = np.random.default_rng(5), []
    for i, work in enumerate(works):
        factors, rank = {}, ranks[i % len(ranks)]
        if work.gates is not None and rank:
            for site, (inputs, outputs) in config.ffn_shapes.items():
                a = rng.standard_normal((config.num_layers, inputs, rank), np.float32)
                factors[site] = {"a": a, "b": rng.standard_normal((config.num_layers, rank, outputs), np.float32)}
        made.append(dataclasses.replace(work, factors=factors))
    return made


def test_rows_with_factors_beside_their_gates_answer_as_their_merged_models_do(llama):
    """Rows that had some leave nothing to those that come after them."""
    adapter = make_gates(llama.decoder.config, prompts=5)
    works = with_factors(llama.decoder.config, make_works(llama.decoder.config, adapter, 16))
    engine = Engine(llama.edge(adapter), rows=3, slots=SLOTS, rank=4)
    expected = [offline(llama, adapter, work) for work in works]
    assert_same(run(engine, works), expected)
    plain = [dataclasses.replace(work, factors={}) for work in works]
    assert_same(run(engine, plain), [offline(llama, adapter, work) for work in plain])
    for how in ("mixed", "merged"):
        assert_same(answer_all(llama.edge(adapter), works, rows=3, how=how), expected)


def test_factors_that_a_row_has_no_room_for_are_refused(llama):
    adapter = make_gates(llama.decoder.config, prompts=5)
    (work,) = with_factors(llama.decoder.config, make_works(llama.decoder.config, adapter, 1), ranks=(3,))
    for room in (2, 0):
        with raises(DataError, "factors", "rank 3", f"rank {room}"):
            Engine(llama.edge(adapter), rows=3, slots=SLOTS, rank=room).check(work)


def test_a_bad_query_among_many_is_named_before_anything_is_generated(llama):
    adapter = make_gates(llama.decoder.config, prompts=5)
    works = make_works(llama.decoder.config, adapter, 4)
    for bad, field, fact in (
        (dataclasses.replace(works[1], ids=[67]), "prompt", 67),
        (dataclasses.replace(works[1], gates=Gates.of_all(np.zeros((2, 3), np.float32))), "gates", "(2, 3)"),
    ):
        for how in ("mixed", "merged"):
            with raises(DataError, field, "request 2 of 4", fact):
                answer_all(llama.edge(adapter), [works[0], bad, *works[2:]], how=how, progress=pytest.fail)


def test_merging_is_for_one_specialization_or_full_batches():
    for sizes, better in (([1], False), ([500], False), ([1, 1], True), ([60, 1, 1], True), ([40, 64], False)):
        assert mixed_is_better(sizes) == better


def test_once_warm_nothing_is_compiled(llama):
    adapter = make_gates(llama.decoder.config, prompts=5)
    engine = Engine(llama.edge(adapter), rows=4, slots=SLOTS)
    engine.warm_up()
    assert engine.busy == 0
    programs = decode._cache_size(), join._cache_size()
    longer = [dataclasses.replace(work, ids=[5] * 18) for work in make_works(llama.decoder.config, adapter, 5)]
    works = make_works(llama.decoder.config, adapter, 12, temperature=(0.0, 1.0), seed=range(12))
    found = run(engine, works + longer)
    assert (decode._cache_size(), join._cache_size()) == programs
    assert_same(found[:2], [offline(llama, adapter, work) for work in works[:2]])


def test_rows_are_split_over_a_mesh(llama):
    mesh = make_mesh(data=2, fsdp=2)
    shardings = param_shardings(mesh, lambda: llama.decoder.init(jax.random.key(0), np.zeros((1, 1), np.int32)))
    spread = llama._replace(params=jax.device_put(llama.params, shardings["params"]))
    adapter = make_gates(llama.decoder.config, prompts=5)
    works = make_works(llama.decoder.config, adapter, 8)
    engine = Engine(spread.edge(adapter), rows=3, slots=SLOTS)
    assert engine.rows == 4
    assert_same(run(engine, works), [offline(llama, adapter, work) for work in works])
    assert not engine.state.cache.k_LBSGH.sharding.is_fully_replicated


def test_without_a_pool_the_base_model_is_served():
    model = make_model(CONFIGS["llama"])
    work = GenerationRequest([5, 6, 7], settings(6))
    engine = Engine(model.edge(), rows=1, slots=SLOTS)
    assert_same(run(engine, [work]), [offline(model, None, work)])
    with raises(DataError, "gates", "(2, 4)"):
        engine.check(dataclasses.replace(work, gates=Gates.of_all(np.zeros((2, 4), np.float32))))


@pytest.mark.parametrize(
    ("change", "error", "field", "code", "facts"),
    [
        ({"ids": ()}, DataError, "prompt", "empty", ()),
        ({"ids": (5, 67)}, DataError, "prompt", "unknown id", (67,)),
        ({"max_new_tokens": 0}, DataError, "max_new_tokens", "range", (0,)),
        ({"ids": (5,) * 20, "max_new_tokens": 9}, DataError, "max_new_tokens", "too long", (20, 9, 28)),
        ({"stop_ids": tuple(range(9))}, DataError, "stop_ids", None, (9,)),
        ({"gates": Gates.of_all(np.zeros((3, 4), np.float32))}, DataError, "gates", None, ("(3, 4)",)),
        ({"seed": -1}, DataError, "seed", None, (-1,)),
        ({"seed": 2**32}, DataError, "seed", None, (2**32,)),
        ({"temperature": float("nan")}, ConfigError, "temperature", None, ("nan",)),
        ({"top_p": 0.0}, ConfigError, "top_p", None, ("0.0",)),
    ],
)
def test_a_work_that_cannot_be_done_is_refused(llama, change, error, field, code, facts):
    engine = Engine(llama.edge(make_gates(llama.decoder.config, 1)), rows=1, slots=SLOTS)
    with raises(error, field, *facts, code=code):
        own = {name: change[name] for name in ("ids", "gates") if name in change}
        how = {"max_new_tokens": 4} | {name: value for name, value in change.items() if name not in own}
        engine.check(GenerationRequest(**{"ids": (5, 6)} | own, settings=settings(**how)))


@pytest.mark.parametrize(
    ("rows", "slots", "field", "facts"), [(0, 8, "rows", (0,)), (1, 65, "context", (65, "2 to 64"))]
)
def test_a_batch_that_the_model_cannot_hold_is_refused(llama, rows, slots, field, facts):
    with raises(ConfigError, field, *facts):
        Engine(llama.edge(), rows=rows, slots=slots)


def test_rows_that_no_memory_holds_are_refused_before_any_is_made():
    model = make_model(CONFIGS["llama"])
    with raises(ConfigError, "rows", 10**9, SLOTS, code="memory"):
        Engine(model.edge(), rows=10**9, slots=SLOTS)
