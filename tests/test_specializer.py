"""Prompts in, specializations out: one by one, by the dozen, on several devices; and back to the generator."""

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import WORDS, raises, trained, write_model

from lora_gen_jax import specializer as module
from lora_gen_jax.adapters.specialization import save_specialization
from lora_gen_jax.adapters.specialization_fit import pool_fingerprint
from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.errors import CheckpointError, DataError
from lora_gen_jax.generator import specialize as specializing
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.specializer import Specializer, find_generator, read_specialization, relocate
from lora_gen_jax.training.checkpoint import load_checkpoint, versions
from lora_gen_jax.training.portable import SHIPPED

pytestmark = pytest.mark.float64
# Computed in float64, where two ways differ by 1e-13, and stored in float32, whose numbers below 1 are 2^-24 apart.
CLOSE = {"atol": 2.0**-24, "rtol": 0}
PROMPT = "say the color of the sun\n\nwhat kind is the star ?\nred"


@pytest.fixture(scope="module")
def specializer():
    return Specializer.load(trained().directory)


@pytest.fixture(scope="module")
def prompts():
    """Forty, of two to 45 words (three lengths once padded), in no order."""
    rng = np.random.default_rng(3)
    lengths = [*rng.integers(2, 14, 20), *rng.integers(16, 29, 14), *rng.integers(34, 45, 6)]
    return [" ".join(rng.choice(WORDS, length)) for length in rng.permutation(lengths)]


@pytest.fixture(scope="module")
def short(prompts):
    """Where sixteen prompts of one padded length are."""
    return [i for i, prompt in enumerate(prompts) if len(prompt.split()) < 15][:16]


@pytest.fixture(scope="module")
def forty(specializer, prompts):
    """(their specializations, what progress said, the programs that were compiled)."""
    generate: Any = specializing._generate
    jax.clear_caches()  # another file may have compiled the same
    said, before = [], generate._cache_size()
    made = specializer.specialize(prompts, lambda done, total: said.append((done, total)), batch=8)
    return made, said, generate._cache_size() - before


def gates_of(made):
    return np.stack([one.gates(4).dense() for one in made])


def test_forty_prompts_at_once_get_the_gates_of_one_by_one_in_their_order(specializer, prompts, forty):
    made, _, _ = forty
    assert [one.prompt for one in made] == prompts
    alone = [specializer.specialize([prompt])[0] for prompt in prompts]
    np.testing.assert_allclose(gates_of(made), gates_of(alone), **CLOSE)
    assert len(np.unique(gates_of(made).round(4), axis=0)) > 30


def test_batches_of_one_length_share_a_program(specializer, prompts, forty):
    made, said, programs = forty
    buckets = {specializing.bucket(len(specializer.ids(prompt)) + 2) for prompt in prompts}
    assert programs == len(buckets) < len(said)
    assert said[-1] == (40, 40)
    done = [n for n, _ in said]
    assert done == sorted(done)
    assert max(np.diff([0, *done])) <= 8
    assert made[0].versions == versions()


def test_batches_hold_no_more_tokens_than_scoring_ones(specializer):
    """Each batch: prompts that it reads and the rows that it is padded to."""
    chunks = specializer._chunks([5] * 3 + [90] * 200, 10_000)
    tokens = trained().eval.batch_tokens
    short, *long = [(len(chunk), size) for chunk, size in chunks]
    assert short == (3, 4)
    assert {size for _, size in long} == {64}
    assert 64 * 96 <= tokens < 128 * 96
    assert sum(count for count, _ in long) == 200
    assert specializer._chunks([5, 6], 0) == [([0], 1), ([1], 1)]


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1)])
def test_several_devices_give_the_gates_of_one(prompts, short, forty, sizes):
    several = Specializer.load(trained().directory, mesh=make_mesh(*sizes))
    found = several.specialize([prompts[i] for i in short[:7]])
    np.testing.assert_allclose(gates_of(found), gates_of(forty[0])[short[:7]], **CLOSE)


def test_the_rows_of_a_batch_are_split_over_the_devices(monkeypatch):
    seen, generate = [], specializing._generate

    def watched(generator, variables, frozen, packed):
        seen.append(packed.tokens_BT.sharding.shard_shape(packed.tokens_BT.shape))
        return generate(generator, variables, frozen, packed)

    monkeypatch.setattr(specializing, "_generate", watched)
    several = Specializer.load(trained().directory, mesh=make_mesh(4))
    for count, rows in ((8, 2), (1, 1)):
        several.specialize([PROMPT] * count)
        assert seen.pop() == (rows, 16)


def test_a_specialization_knows_where_it_comes_from(specializer):
    (made,) = specializer.specialize([PROMPT])
    loaded = load_checkpoint(trained().directory)
    assert made.checkpoint == str(trained().directory / "checkpoints" / "24")
    assert made.fingerprints == {**loaded.fingerprints, "pool": pool_fingerprint(loaded.variables)}
    assert not made.direct
    assert specializer.config.name == "tiny"


def test_no_prompts_make_no_specializations(specializer):
    assert specializer.specialize([]) == []


def test_threads_get_what_one_thread_gets(specializer, prompts, short, forty):
    found = {}
    halves = short[:8], short[8:]

    def run(half):
        found[half] = specializer.specialize([prompts[i] for i in halves[half]], batch=8)

    threads = [threading.Thread(target=run, args=(half,)) for half in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for half in (0, 1):
        np.testing.assert_allclose(gates_of(found[half]), gates_of(forty[0])[halves[half]], **CLOSE)


@pytest.mark.parametrize(
    ("prompt", "code", "facts"),
    [(" \n", "empty", ()), ("red " * 200, "too long", (200, 128)), ("red \udc80", "surrogate", ())],
)
def test_a_prompt_that_cannot_be_read_is_refused_before_any_is(specializer, prompt, code, facts):
    with raises(DataError, "prompt", *facts, code=code):
        specializer.ids(prompt)
    with raises(DataError, "prompt", *facts, code=code) as error:
        specializer.specialize([prompt])
    assert "1 of 1" not in str(error.value)
    with raises(DataError, "prompt", "prompt 2 of 3", *facts, code=code):
        specializer.specialize(["red", prompt, "blue"], lambda *_: pytest.fail("something was computed"))


def test_a_prompt_at_the_limit_is_read_and_the_models_positions_limit_it_too(specializer):
    assert len(specializer.ids("red " * 128)) == specializer.limit == 128
    config = dataclasses.replace(
        specializer.config, eval=dataclasses.replace(specializer.config.eval, prompt_limit=999)
    )
    wide = Specializer(dataclasses.replace(specializer.loaded, config=config), specializer.pair)
    assert wide.limit == 160 - 2
    assert len(wide.specialize(["red " * 158])) == 1
    with raises(DataError, "prompt", 159, 158, code="too long"):
        wide.ids("red " * 159)


def test_another_method_and_other_models_are_refused(specializer, monkeypatch):
    config = dataclasses.replace(specializer.config, method="lora")
    loaded = dataclasses.replace(specializer.loaded, config=config)
    with raises(CheckpointError, "method", "lora"):
        Specializer(loaded, specializer.pair)
    monkeypatch.setattr(module, "load_checkpoint", lambda path: loaded)
    monkeypatch.setattr(module, "load_pair", lambda *_: pytest.fail("the models were read"))
    with raises(CheckpointError, "method", "lora"):
        Specializer.load(trained().directory)
    fingerprints = {**specializer.loaded.fingerprints, "edge": "0" * 16}
    other = dataclasses.replace(specializer.loaded, fingerprints=fingerprints)
    with raises(CheckpointError, "edge.source"):
        Specializer(other, specializer.pair)


def test_a_shipped_generator_is_found_again_by_its_pool():
    from lora_gen_jax.models import load_pair

    loaded = load_checkpoint(Path("quickstart"))
    shipped = Specializer(loaded, load_pair(loaded.config))
    (made,) = shipped.specialize(["Give the animal's young, in brackets."])
    assert made.checkpoint is None
    assert find_generator(made, None).path == SHIPPED["quickstart"]
    absent = dataclasses.replace(made, fingerprints={**made.fingerprints, "pool": "0" * 16})
    with raises(CheckpointError, "--checkpoint", "--checkpoint DIR"):
        find_generator(absent, None)


def test_a_specialization_is_read_with_its_generator(specializer, tmp_path):
    (made,) = specializer.specialize([PROMPT])
    save_specialization(made, tmp_path / "s")
    elsewhere = str(shutil.copytree(trained().edge.source, tmp_path / "elsewhere"))
    found, loaded, config = read_specialization(tmp_path / "s", None, elsewhere)
    np.testing.assert_array_equal(found.gates(4).dense(), made.gates(4).dense())
    assert (loaded.step, config.edge.source, config.cloud.source) == (24, elsewhere, trained().cloud.source)
    shutil.copytree(loaded.path, tmp_path / "moved")
    assert read_specialization(tmp_path / "s", tmp_path / "moved", None)[1].path == tmp_path / "moved"
    with raises(CheckpointError, "specialization.safetensors:pool", tmp_path / "s"):
        read_specialization(tmp_path / "s", trained().directory / "checkpoints" / "12", None)
    with raises(CheckpointError, "specialization.safetensors:pool", tmp_path / "s"):
        read_specialization(tmp_path / "s", SHIPPED["quickstart"], None)
    with raises(CheckpointError, "--edge", tmp_path / "s", "--edge"):
        read_specialization(tmp_path / "s", None, str(write_model(tmp_path / "other", seed=9)))
    save_specialization(dataclasses.replace(made, checkpoint="gone"), tmp_path / "lost")
    with raises(CheckpointError, "--checkpoint", "(gone)"):
        read_specialization(tmp_path / "lost", None, None)


def test_an_address_that_a_specialization_records_is_opened_below_a_local_path_or_on_request(specializer, monkeypatch):
    """Its author may be anyone: the reader's own credentials go nowhere that they did not name."""
    (made,) = specializer.specialize([PROMPT])
    opened = []

    def load(path):
        opened.append(str(path))
        return load_checkpoint(trained().directory if str(path).startswith("gs://") else path)

    monkeypatch.setattr("lora_gen_jax.specializer.load_checkpoint", load)
    for address in ("gs://elsewhere/run", "gs:/elsewhere/run", "s3://elsewhere/run", "file://elsewhere/run"):
        opened.clear()
        with raises(CheckpointError, "--checkpoint", address, "--trust-recorded"):
            find_generator(dataclasses.replace(made, checkpoint=address), None)
        assert opened == [str(path) for path in SHIPPED.values()]
    remote = dataclasses.replace(made, checkpoint="gs://elsewhere/run")
    assert find_generator(remote, None, follow_remote=True).step == 24
    # A shipped generator is found before anything that is recorded, and one with another pool is never used.
    pool = pool_fingerprint(load_checkpoint(SHIPPED["quickstart"]).variables)
    quick = dataclasses.replace(remote, fingerprints={**made.fingerprints, "pool": pool})
    opened.clear()
    assert find_generator(quick, None, follow_remote=True).path == SHIPPED["quickstart"]
    assert opened == [str(SHIPPED["quickstart"])]
    other = dataclasses.replace(made, fingerprints={**made.fingerprints, "pool": "0" * 16})
    with raises(CheckpointError, "--checkpoint", "0" * 16):
        find_generator(other, None)


def test_gates_that_are_no_numbers_are_not_handed_out(specializer, monkeypatch):
    def broken(*args):
        generated = specialize(*args)
        return generated.replace(gates=generated.gates.replace(weight=generated.gates.weight * np.nan))

    monkeypatch.setattr("lora_gen_jax.specializer.specialize", broken)
    with raises(CheckpointError, "the specialization that was made:weight", code="not finite"):
        specializer.specialize([PROMPT])


@pytest.mark.parametrize("change", ["missing", "renamed", "misshaped"])
def test_a_generator_whose_tensors_are_not_its_modules_is_refused(specializer, change):
    variables = jax.tree.map(lambda x: x, specializer.loaded.variables)
    pool = variables["params"]["pool"]
    value = pool.pop("up_a")
    if change != "missing":
        pool["up_a" if change == "misshaped" else "up_c"] = value[..., :1] if change == "misshaped" else value
    place = specializer.loaded.path
    with raises(CheckpointError, f"{place}:params/pool/up_a", code="shape" if change == "misshaped" else "missing"):
        Specializer(dataclasses.replace(specializer.loaded, variables=variables), specializer.pair)


def test_models_are_relocated_one_by_one():
    config = trained()
    assert relocate(config, None, None) == config
    moved = relocate(config, "a", "b")
    assert (moved.cloud.source, moved.edge.source) == ("a", "b")
    assert dataclasses.replace(moved, cloud=config.cloud, edge=config.edge) == config


def test_a_prompt_of_megabytes_is_refused_unread(specializer, monkeypatch):
    monkeypatch.setattr(Encoder, "text", lambda self, text: pytest.fail("it was made into tokens"))
    for ask in (specializer.ids, lambda text: specializer.specialize([text])):
        with raises(DataError, "prompt", 4_000_000, 128, code="too long"):
            ask("red " * 1_000_000)
    assert not specializer.fits("red " * 1_000_000)
