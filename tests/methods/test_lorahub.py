"""LoraHub: modules of single tasks, their composition, and a search that finds the module that helps."""

import dataclasses
import itertools
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    EDGE,
    OPT,
    SAME,
    SETTINGS,
    experiment,
    filled,
    logits,
    padded,
    prompts_of,
    raises,
    random_params,
    token_rows,
)

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import Config, HubConfig, TrainConfig
from lora_gen_jax.data.tasks import Example, Task
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.methods import hub_search, lorahub
from lora_gen_jax.methods.hub_search import Found, search
from lora_gen_jax.methods.lorahub import LoRAModules, choose_tasks, compose
from lora_gen_jax.methods.method import Prompt
from lora_gen_jax.models import load_pair
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training.checkpoint import Loaded
from lora_gen_jax.training.prepare import make_sampler, training_tasks

pytestmark = pytest.mark.float64
SITES = ("q", "v", "gate", "up", "down")
N, SCALE = 4, SETTINGS.alpha / SETTINGS.rank
WEIGHTS = np.array([0.7, -0.4, 0.0, 1.2])
TOKENS = np.array(token_rows([7, 7, 7], EDGE.vocab_size), np.int32)
TASKS = [3, 1, 3]


def modules_of(config, seed=3):
    """(module, its prompts, params with B away from zero)."""
    module = LoRAModules(config, SETTINGS, N)
    prompts = prompts_of([3, 4, 5], 3, 16).replace(tasks_P=np.array(TASKS, np.int32))
    shapes = jax.eval_shape(module.init, jax.random.key(0), None, prompts)
    return module, prompts, filled(shapes["params"], seed)


def test_one_lora_a_task_that_starts_at_the_base():
    names = set(modules_of(EDGE)[2])
    assert names == {f"{site}_{part}" for site in SITES for part in "ab"}
    assert set(modules_of(OPT)[2]) == names - {"gate_a", "gate_b"}
    _, prompts, _ = modules_of(EDGE)
    module = LoRAModules(EDGE, dataclasses.replace(SETTINGS, lora_sites=("down",)), N)
    params = jax.jit(module.init)(jax.random.key(0), None, prompts)["params"]
    assert params["down_b"].shape == (N, EDGE.num_layers, SETTINGS.rank, EDGE.width)
    assert not np.any(params["down_b"])
    # Every matrix is Kaiming-uniform on its own: the bound is of its inputs, and no two modules are alike.
    assert params["down_a"].shape == (N, EDGE.num_layers, EDGE.ffn_width, SETTINGS.rank)
    assert 0.9 < float(np.max(np.abs(params["down_a"]))) * EDGE.ffn_width**0.5 <= 1
    assert not np.array_equal(params["down_a"][0], params["down_a"][1])
    with raises(DataError, "prompts.tasks_P"):
        module.init(jax.random.key(0), None, prompts.replace(tasks_P=None))


def test_a_row_reads_its_own_tasks_module_and_trains_no_other():
    module, prompts, params = modules_of(EDGE)
    decoder, base = Decoder(EDGE), random_params(EDGE)

    adapter = module.apply({"params": params}, None, prompts).adapter
    for site, part in itertools.product(SITES, "ab"):
        for row, task in enumerate(TASKS):
            np.testing.assert_array_equal(adapter.scanned[site][part][:, row], params[f"{site}_{part}"][task])

    @jax.jit
    @jax.grad
    def gradient_of(params, row_P):
        adapter = module.apply({"params": params}, None, prompts).adapter
        hidden, _ = decoder.apply({"params": base}, TOKENS, adapter=adapter)
        return jnp.sum(jnp.sum(hidden**2, axis=(1, 2)) * row_P)

    for row, task in enumerate(TASKS):
        for name, gradient in gradient_of(params, np.eye(len(TASKS), dtype=np.float32)[row]).items():
            assert [n for n in range(N) if np.any(gradient[n])] == [task], name


def test_factors_are_summed_so_the_product_has_cross_terms():
    _, _, params = modules_of(EDGE)
    adapter = compose({"params": params}, WEIGHTS, SCALE)
    for site in SITES:
        a_NLXR, b_NLRY = (np.asarray(params[f"{site}_{part}"], np.float64) for part in "ab")
        for layer in range(EDGE.num_layers):
            one = adapter.replace(scanned=jax.tree.map(lambda x, layer=layer: x[layer], adapter.scanned))
            pairs = [(i, j) for i in range(N) for j in range(N)]
            products = [WEIGHTS[i] * WEIGHTS[j] * a_NLXR[i, layer] @ b_NLRY[j, layer] for i, j in pairs]
            np.testing.assert_allclose(one.weight_delta(site), SCALE * sum(products), **SAME)
            without = sum(WEIGHTS[i] * a_NLXR[i, layer] @ b_NLRY[i, layer] for i in range(N))
            assert np.max(np.abs(sum(products) - without)) > 0.05


def test_merged_equals_the_side_path():
    adapter = compose({"params": modules_of(EDGE)[2]}, WEIGHTS, SCALE)
    base, decoder = random_params(EDGE), Decoder(EDGE)
    beside = logits(decoder, base, TOKENS, adapter=adapter)
    np.testing.assert_allclose(logits(decoder, merge(base, adapter), TOKENS), beside, **SAME)
    assert np.max(np.abs(np.asarray(beside) - logits(decoder, base, TOKENS))) > 0.1


def some_tasks(count):
    example = Example("0", "what is red ?", "a color")
    return [Task(f"task{i}", (), [example], [], source=f"source{i % 2}") for i in range(count)]


def with_seed(seed, modules=3):
    return Config(hub=HubConfig(modules=modules), train=TrainConfig(seed=seed))


def test_tasks_are_drawn_by_the_seed_whatever_their_order():
    tasks = some_tasks(9)
    chosen = choose_tasks(with_seed(0), tasks)
    assert len(chosen) == 3
    assert chosen == [task for task in tasks if task in chosen]
    assert set(chosen) == set(choose_tasks(with_seed(0), tasks[::-1]))
    assert len({tuple(task.name for task in choose_tasks(with_seed(seed), tasks)) for seed in range(5)}) >= 4
    assert choose_tasks(with_seed(5, 9), tasks) == tasks


def test_tasks_without_training_rows_are_no_modules():
    tasks = some_tasks(4)
    tasks[1] = dataclasses.replace(tasks[1], train=[])
    assert choose_tasks(with_seed(0), tasks) == [tasks[0], *tasks[2:]]
    with raises(ConfigError, "hub.modules", 4, 3):
        choose_tasks(with_seed(0, 4), tasks)


def test_names_of_tasks_that_are_no_modules_are_fine_and_unknown_ones_not(tmp_path):
    config = experiment(tmp_path, tmp_path / "run")
    others = tmp_path / "others.jsonl"
    others.write_text((tmp_path / "rows.jsonl").read_text().replace('"warm"', '"hot"').replace('"count"', '"number"'))
    names = {"source_weights": ("rows=1", "others=2"), "knowledge_tasks": ("warm", "hot", "others")}
    data = dataclasses.replace(config.data, files=(*config.data.files, others), **names)
    config = dataclasses.replace(config, method="lorahub", hub=HubConfig(modules=1), data=data)
    (task,) = training_tasks(config)
    sampler = make_sampler(config, load_pair(config), [task], "train")
    group = sampler.draw(np.random.default_rng(0))
    assert (group.task, group.knowledge) == (0, task.name in ("warm", "hot") or task.source == "others")
    for field, named in (("source_weights", "'other'"), ("knowledge_tasks", "'other=1'")):
        wrong = dataclasses.replace(data, **{field: ("other=1",)})
        with raises(ConfigError, f"data.{field}", named):
            training_tasks(dataclasses.replace(config, data=wrong))


TARGET = np.array([0.5, -1.0, 0.0])
# Of the way down from the start: what any optimizer makes in a dozen candidates for each weight. Where it ends in the
# flat bottom of a bowl is its own affair, and its version's.
SHARE = 0.9


def bowl(weights_N):
    return float(np.sum((weights_N - TARGET) ** 2))


def test_the_search_starts_at_zero_spends_its_budget_and_stays_within_the_bounds():
    seen = []
    found = search(lambda w: seen.append(w.copy()) or bowl(w), 3, HubConfig(budget=40, bound=0.8, penalty=0.0))
    assert len(seen) == 40
    assert not np.any(seen[0])
    assert np.max(np.abs(seen)) <= 0.8
    assert found.objective == min(map(bowl, seen)) == bowl(found.weights_N)
    start, least = bowl(np.zeros(3)), bowl(np.array([0.5, -0.8, 0.0]))
    assert start - found.objective >= SHARE * (start - least)


def test_the_penalty_is_of_the_mean_absolute_weight():
    found, free = (search(bowl, 3, HubConfig(budget=100, penalty=penalty)) for penalty in (1.8, 0.0))

    def penalized(weights_N):
        return bowl(weights_N) + 0.6 * np.sum(np.abs(weights_N))

    np.testing.assert_allclose(found.objective, penalized(found.weights_N))
    start = bowl(np.zeros(3))
    assert start - free.objective >= SHARE * start
    # The slope of the penalty is 0.6 for each weight, that of the bowl 2·(w - target): 0.3 towards zero.
    assert start - found.objective >= SHARE * (start - penalized(np.array([0.2, -0.7, 0.0])))


def test_the_loss_counts_once_for_all_shots_as_in_the_authors_code():
    """Theirs: the mean over the shots' tokens divided by the number of shots, + 0.05 · Σ|w| / number of modules."""
    settings = HubConfig(budget=60)

    def published(weights_N):
        return float(bowl(weights_N)) / 5 + 0.05 * float(np.mean(np.abs(weights_N)))

    found = search(bowl, 3, settings, shots=5)
    want = search(published, 3, dataclasses.replace(settings, penalty=0.0))
    # The same operations in the same order: near a minimum, a search follows the last bit of what it is told.
    np.testing.assert_array_equal(found.weights_N, want.weights_N)
    assert found.objective == published(found.weights_N)
    # With the loss whole, the penalty is a fifth as heavy, and the search ends elsewhere.
    assert np.any(search(bowl, 3, settings).weights_N != found.weights_N)


def test_what_the_optimizer_recommends_is_taken_though_it_was_no_candidate(monkeypatch):
    class Fixed:
        """Asks for 1, 0, 0 and recommends the target."""

        def ask(self):
            return SimpleNamespace(value=np.array([1.0, 0.0, 0.0]))

        def tell(self, candidate, value):
            pass

        def provide_recommendation(self):
            return SimpleNamespace(value=TARGET)

    monkeypatch.setattr(hub_search, "_optimizer", lambda *_: Fixed())
    found = search(bowl, 3, HubConfig(), shots=2)
    np.testing.assert_array_equal(found.weights_N, TARGET)
    np.testing.assert_allclose(found.objective, 0.05 * 0.5, rtol=1e-12)


def test_the_search_neither_reads_nor_changes_the_global_random_state():
    def run(seed):
        np.random.seed(seed)
        before = np.random.get_state()[1].copy()
        seen = []
        found = search(lambda w: seen.append(w.copy()) or bowl(w), 3, HubConfig())
        np.testing.assert_array_equal(np.random.get_state()[1], before)
        return np.array(seen), found.weights_N

    state = np.random.get_state()
    try:
        for one, other in zip(run(0), run(1), strict=True):
            np.testing.assert_array_equal(one, other)
    finally:
        np.random.set_state(state)


def test_a_search_that_fails_leaves_no_thread_behind():
    """NGOpt's own would wait for an answer for ever, and the process with it."""
    before = set(threading.enumerate())

    failure = ValueError("out of memory")

    def fails(weights_N):
        if np.any(weights_N):
            raise failure
        return 1.0

    with pytest.raises(ValueError) as raised:  # noqa: PT011 (it is that very one)
        search(fails, 3, HubConfig())
    assert raised.value is failure
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_what_a_search_refuses(monkeypatch):
    with raises(ConfigError, "hub.budget", 151, 150):
        search(bowl, 3, HubConfig(budget=151))
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with raises(ConfigError, "nevergrad", "pip install 'lora_gen_jax[hub]'"):
        search(bowl, 3, HubConfig())


# A task of its own for a model with random weights: three shots that one module has learned by heart.
SHOTS = tuple(
    Example(str(i), f"what is the {thing} ?", answer)
    for i, (thing, answer) in enumerate((("sun", "hot star"), ("stone", "cold and small"), ("fish", "fast")))
)
PROMPT = Prompt("say what it is", SHOTS, chat=False)
HELPFUL = 3


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(pair, loaded): five modules for a random llama, of which the one that is `HELPFUL` makes the shots likely."""
    root = tmp_path_factory.mktemp("lorahub")
    config = dataclasses.replace(experiment(root, root / "run"), hub=HubConfig(modules=5), method="lorahub")
    pair = load_pair(config)
    module = lorahub.build(config, pair)
    prompts = prompts_of([3], 1, 16).replace(tasks_P=np.array([HELPFUL], np.int32))
    params = filled(jax.eval_shape(module.init, jax.random.key(0), None, prompts)["params"], 1)
    loaded = Loaded(0, {"params": params}, config, {}, {}, Path("nowhere"))
    return pair, dataclasses.replace(loaded, variables={"params": learned(pair, loaded, params)})


def learned(pair, loaded, params):
    """The modules after a few steps on the shots at weight 1.3 of the helpful one: at weight 1 it falls short."""
    batch = lorahub.one_row(pair.edge, lorahub.shots_of(pair.edge, PROMPT))
    weights, optimizer = 1.3 * np.eye(5, dtype=np.float32)[HELPFUL], optax.adam(3e-2)
    scale = loaded.config.generator.alpha / loaded.config.generator.rank

    @jax.jit
    def step(params, state):
        def loss_of(params):
            return lorahub._loss(pair.edge.decoder, scale, pair.edge.params, params, weights, batch)

        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss_of)(params), state)
            return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(12):
        params, state = step(params, state)
    return params


def test_the_search_finds_the_module_that_helps(setting):
    pair, loaded = setting
    found = lorahub.found_weights(loaded.config.hub, pair, loaded)(PROMPT)
    assert np.argmax(np.abs(found.weights_N)) == HELPFUL
    hub, loss_of = loaded.config.hub, lorahub.shots_loss(pair.edge, loaded)(PROMPT)
    each = np.eye(hub.modules)
    assert np.argmin([loss_of(row) for row in each]) == HELPFUL
    # From the base to the least on the line of the module that helps; the loss of three shots counts a third beside the
    # penalty.
    base, line = loss_of(np.zeros(hub.modules)) / 3, np.linspace(0, hub.bound, 16)
    line = min(loss_of(w * each[HELPFUL]) / 3 + hub.penalty * w / hub.modules for w in line)
    assert base - line > 0.5 / 3
    assert base - found.objective >= SHARE * (base - line)
    again = lorahub.found_weights(loaded.config.hub, pair, loaded)(PROMPT)
    np.testing.assert_array_equal(again.weights_N, found.weights_N)
    assert again.objective == found.objective


def test_the_task_is_answered_by_the_merged_weights_that_were_found(setting):
    pair, loaded = setting
    found, hub = lorahub.found_weights(loaded.config.hub, pair, loaded)(PROMPT), loaded.config.hub
    made = lorahub.METHOD.specialize(loaded.config, pair, loaded)(PROMPT)
    assert made.adapter is None
    assert made.prefix is None
    pairs = [pair.edge.encoder.query(shot, False) for shot in SHOTS]
    pairs = [(query, [*response, pair.edge.encoder.end]) for query, response in pairs]
    # Every shot by itself, as the model reads it, through the merged weights: its answer and the end.
    said = logits(pair.edge.decoder, made.params, *padded([query + response for query, response in pairs], 12))
    losses = []
    for row, (query, response) in zip(np.asarray(said, np.float64), pairs, strict=True):
        for place, token in enumerate(response, start=len(query) - 1):
            losses.append(np.log(np.sum(np.exp(row[place]))) - row[place, token])
    penalty = hub.penalty * np.mean(np.abs(found.weights_N))
    np.testing.assert_allclose(np.mean(losses) / len(SHOTS), found.objective - penalty, **SAME)


def test_tasks_of_about_the_same_length_share_one_program(setting):
    pair, loaded = setting
    losses = lorahub.shots_loss(pair.edge, loaded)
    losses(PROMPT)(np.ones(5))
    count = lorahub._loss._cache_size()
    other = dataclasses.replace(SHOTS[0], query="what color is the big cat ?")
    found = losses(Prompt("", (SHOTS[1], other, SHOTS[2]), False))(np.zeros(5))
    assert found != losses(PROMPT)(np.zeros(5))
    assert lorahub._loss._cache_size() == count


def test_weights_on_several_devices_give_the_same_loss_and_merge(setting, monkeypatch):
    """For the same weights; where two searches end depends on the last digits of every loss on their way."""
    pair, loaded = setting
    spread = load_pair(loaded.config, make_mesh(data=2, fsdp=1, model=2))
    weights = np.linspace(-1, 1, 5)
    one, several = (lorahub.shots_loss(p.edge, loaded)(PROMPT)(weights) for p in (pair, spread))
    np.testing.assert_allclose(several, one, **SAME)
    monkeypatch.setattr(lorahub, "search", lambda loss_of, *settings: Found(weights, loss_of(weights)))
    ours, theirs = (lorahub.METHOD.specialize(loaded.config, p, loaded)(PROMPT).params for p in (pair, spread))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **SAME), theirs, ours)


@pytest.mark.parametrize("prompt", [None, Prompt("say what it is", (), False)])
def test_without_shots_there_is_nothing_to_search_by(setting, prompt):
    pair, loaded = setting
    with raises(DataError, "eval.shots"):
        lorahub.METHOD.specialize(loaded.config, pair, loaded)(prompt)


def test_a_shot_that_the_edge_has_no_positions_for_is_refused(setting):
    pair, loaded = setting
    long = dataclasses.replace(SHOTS[0], query="what is " + "red " * 160 + "?")
    with raises(DataError, long.id, 165, 160):
        lorahub.found_weights(loaded.config.hub, pair, loaded)(Prompt("", (SHOTS[1], long), False))


def test_a_budget_that_cannot_be_repeated_is_refused_before_training(setting):
    pair, loaded = setting
    config = dataclasses.replace(loaded.config, hub=HubConfig(modules=2, budget=101))
    with raises(ConfigError, "hub.budget", 101):
        lorahub.build(config, pair)
    assert hub_search.CANDIDATES_PER_MODULE * HubConfig().modules >= HubConfig().budget
