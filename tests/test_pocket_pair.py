"""The shipped pair and the shipped generator: models that have learned, so that what they answer can be tested."""

import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import exact_logits

import lora_gen_jax
from lora_gen_jax.cli import main
from lora_gen_jax.config import EvalConfig, ModelConfig
from lora_gen_jax.config_file import read_config
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.pocket.suite import GROUPS
from lora_gen_jax.evaluation.systems import make_systems
from lora_gen_jax.evaluation.task import evaluate_task
from lora_gen_jax.models import load_model, load_pair
from lora_gen_jax.training.checkpoint import load_checkpoint
from lora_gen_jax.training.portable import SHIPPED

POCKET = Path(lora_gen_jax.__file__).parent / "pocket"
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"
SETTINGS = EvalConfig(shots=5, latency=False)


@pytest.fixture(scope="module")
def pair():
    return load_pair(read_config(QUICKSTART))


def accuracy(pair, tasks, method, checkpoints=None):
    system = make_systems(read_config(QUICKSTART), [method], pair, checkpoints or {}, tasks)[method]
    results = [evaluate_task(pair.edge, task, system, SETTINGS) for task in tasks]
    return sum(r["acc"] * r["n"] for r in results) / sum(r["n"] for r in results)


def test_the_package_stays_small():
    sizes = [path.stat().st_size for path in POCKET.rglob("*") if path.suffix in (".json", ".safetensors")]
    assert sum(sizes) < 15e6
    assert sum(path.stat().st_size for path in (POCKET / "generator").iterdir()) < 1e6


@pytest.mark.parametrize("name", ["edge", "cloud"])
def test_transformers_reads_the_same_models(name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(POCKET / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(POCKET / name)
    ours = load_model(ModelConfig(f"pocket-{name}"))
    ids = tokenizer('Give the sound it makes, in double quotes.\n\ncow: "moo"\n\nowl:')["input_ids"]
    assert ids == ours.encoder.text(tokenizer.decode(ids))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    exact, rounding = exact_logits(ours.decoder, ours.params, np.array([ids], np.int32))
    np.testing.assert_allclose(expected, exact[0], rtol=0, atol=rounding)
    assert tokenizer.decode(int(exact[0, -1].argmax())) == ' "'


def test_the_edge_learns_in_context_and_knows_nothing_without(pair):
    unseen = GROUPS["pocket_unseen"]()
    assert accuracy(pair, unseen, "icl") > 0.9
    assert accuracy(pair, unseen, "base") < 0.1


def test_the_shipped_generator_answers_unseen_tasks_without_the_prompt(pair):
    checkpoints = {"lora_gen": load_checkpoint(SHIPPED["quickstart"])}
    unseen = GROUPS["pocket_unseen"]()
    specialized = accuracy(pair, unseen, "lora_gen", checkpoints)
    assert specialized > 0.9
    assert accuracy(pair, unseen, "paraphrase", checkpoints) > 0.9
    for control in ("shuffled", "gibberish", "empty"):
        assert accuracy(pair, unseen, control, checkpoints) < 0.1, control


def test_specialize_and_generate_need_no_training(tmp_path, capsys):
    """From a sentence to an answer on the command line, with the shipped generator."""
    prompt = "Say the animal's sound, put it in double quotes and end with a full stop."
    main(["specialize", "--checkpoint", "quickstart", "--prompt", prompt, "--out", str(tmp_path / "special")])
    assert json.loads((tmp_path / "special" / "specialization.json").read_text())["checkpoint"] is None
    capsys.readouterr()
    main(["generate", "--specialization", str(tmp_path / "special"), "--input", "owl:"])
    assert capsys.readouterr().out.strip() == '"hoot".'
    main(["generate", "--specialization", str(tmp_path / "special"), "--input", "owl:", "--base"])
    assert "hoot" not in capsys.readouterr().out


def test_choices_are_scored_by_likelihood(pair):
    tasks = list(load_tasks(("pocket_unseen_choice",)).values())[:8]
    checkpoints = {"lora_gen": load_checkpoint(SHIPPED["quickstart"])}
    assert accuracy(pair, tasks, "lora_gen", checkpoints) > 0.9
    assert accuracy(pair, tasks, "base") < 0.7


def test_the_pair_was_not_changed_without_its_generator(pair):
    assert load_checkpoint(SHIPPED["quickstart"]).fingerprints == pair.fingerprints
    assert jax.tree.leaves(pair.edge.params)[0].dtype == np.float32
