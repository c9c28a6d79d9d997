"""The generators shipped for SmolLM2-135M: found by name or by default, made for its weights, and they read prompts."""

import dataclasses
import json
from pathlib import Path

import pytest

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.cli import main
from lora_gen_jax.config_file import read_config
from lora_gen_jax.data.reasoning import DESCRIPTIONS
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.decoder import pretrained
from lora_gen_jax.errors import ModelError
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.rows import Request
from lora_gen_jax.inference.scoring import score
from lora_gen_jax.specializer import Specializer
from lora_gen_jax.training.checkpoint import find_checkpoint, load_checkpoint
from lora_gen_jax.training.portable import DEFAULT, SHIPPED, TENSORS

ROOT = Path(__file__).parents[1]
MEGABYTES = 2**20
# Solved examples in the layout of two tasks, none of them from a task's files: shots, and held-out rows.
SHOTS = {
    "arc_easy": (
        "Question: Which of these takes in water for a plant?\nAnswer: roots",
        "Question: Which of these conducts electricity best?\nAnswer: a copper wire",
        "Question: What causes day and night on Earth?\nAnswer: the rotation of Earth",
    ),
    "social_iqa": (
        "Q: Tom dropped his ice cream on the street. How would Tom feel afterwards?\nA: disappointed",
        "Q: Ann carried a heavy box for her neighbor. What will the neighbor want to do next?\nA: thank Ann",
        "Q: Lee hid the present in the garage. Why did Lee do this?\nA: keep it a surprise",
    ),
}
ROWS = {
    "arc_easy": (
        ("Question: Which of these objects is attracted by a magnet?\nAnswer:", " an iron nail"),
        ("Question: Which gas do animals breathe out?\nAnswer:", " carbon dioxide"),
        ("Question: What gives the Earth its light by day?\nAnswer:", " the Sun"),
    ),
    "social_iqa": (
        ("Q: Sam won the race after months of training. How would Sam feel afterwards?\nA:", " proud"),
        ("Q: Eva broke a cup of her friend. What will Eva want to do next?\nA:", " apologize to her friend"),
        ("Q: Ben shared his lunch with Kim. How would you describe Ben?\nA:", " generous"),
    ),
}


NAMES = ("smollm2_tasks", "smollm2_135m")


def _load(name):
    try:
        pretrained.resolve("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"smollm2-135m cannot be fetched: {error}")
    return Specializer.load(name)


@pytest.fixture(scope="module")
def generator():
    """The default, for short tasks."""
    return _load(None)


@pytest.fixture(scope="module")
def reasoning():
    return _load("smollm2_135m")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_its_card_tells_its_size(name):
    loaded = load_checkpoint(Path(name))
    assert loaded.path == SHIPPED[name]
    assert (SHIPPED[name] / TENSORS).stat().st_size < 9 * MEGABYTES
    numbers = sum(x.size for x in _leaves(loaded.variables["params"]))
    card = (DEFAULT.parent / "README.md").read_text()
    assert f"{numbers:,} parameters" in card
    assert f"{loaded.step} of {loaded.config.data.prompts_per_step} prompts" in card
    assert loaded.config.data.dir is None
    assert loaded.config.workdir is None


@pytest.mark.parametrize("name", NAMES)
def test_its_settings_are_its_configs(name):
    shipped, config = load_checkpoint(SHIPPED[name]).config, read_config(ROOT / "configs" / f"{name}.py")
    # What a shipped generator was trained with stays, where a default has changed since.
    variance = {"batch_norm_variance": shipped.generator.batch_norm_variance}
    assert shipped.generator == dataclasses.replace(config.generator, **variance)
    assert (shipped.train, shipped.cloud, shipped.edge) == (config.train, config.cloud, config.edge)
    assert {"hellaswag", "winogrande", "piqa"}.isdisjoint(shipped.data.tasks)


@pytest.mark.parametrize("name", NAMES)
def test_the_config_finds_it_where_nothing_was_trained(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(read_config(ROOT / "configs" / f"{name}.py")).path == SHIPPED[name]


@pytest.mark.network
def test_specialize_takes_it_where_no_checkpoint_is_named(generator, tmp_path):
    main(["specialize", "--prompt", "Answer the question.", "--out", str(tmp_path / "special")])
    readable = json.loads((tmp_path / "special" / "specialization.json").read_text())
    assert readable["checkpoint"] is None
    assert readable["fingerprints"]["edge"] == generator.pair.edge.fingerprint


@pytest.mark.network
@pytest.mark.parametrize(("task", "other"), [("arc_easy", "social_iqa"), ("social_iqa", "arc_easy")])
def test_a_tasks_own_prompt_makes_its_answers_likelier_than_none_and_than_anothers(reasoning, task, other):
    edge = reasoning.pair.edge
    asked = [Request(*_ids(edge.encoder, query, answer)) for query, answer in ROWS[task]]

    def nats(params):
        found = score(EdgeModel(edge.decoder, params), asked, batch_tokens=1024)
        return -sum(one.logprobs[0] for one in found) / sum(len(row.continuations[0]) for row in asked)

    prompts = ["\n\n".join([DESCRIPTIONS[name][0], *SHOTS[name]]) for name in (task, other)]
    own, wrong = (nats(merge(edge.params, reasoning.adapter(one))) for one in reasoning.specialize(prompts))
    assert own < 0.4 * nats(edge.params)
    assert own < 0.9 * wrong


def _ids(encoder, query, answer):
    query, response = encoder.query(Example("", query, answer), False)
    return query, [response]


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]
