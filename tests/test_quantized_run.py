"""A run beside quantized weights, from training to answers: nothing is merged into them, exports are of the floats."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import experiment, raises, refused, write_rows

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.cli import main
from lora_gen_jax.config import Config, ModelConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.decoder.pretrained import load_params
from lora_gen_jax.decoder.quantized import quantized_name
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.methods.method import Prompt
from lora_gen_jax.methods.registry import METHODS
from lora_gen_jax.models import load_pair, precision_of
from lora_gen_jax.specializer import Specializer
from lora_gen_jax.training.loop import train

PROMPT = "say one two three"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a run of two steps: the cloud in int8, the edge in nf4, which are then not the same weights."""
    root = tmp_path_factory.mktemp("quantized")
    config = experiment(root, root / "run", steps=2, validate_every=2, checkpoint_every=2)
    weights = {
        "cloud": dataclasses.replace(config.cloud, weights="int8"),
        "edge": dataclasses.replace(config.edge, weights="nf4"),
    }
    config = dataclasses.replace(config, **weights)
    train(config)
    return config


@pytest.fixture(scope="module")
def specializer(config):
    return Specializer.load(config.workdir)


@pytest.fixture(scope="module")
def special(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("special") / "count"
    main(["specialize", "--checkpoint", str(config.workdir), "--prompt", PROMPT, "--out", str(directory)])
    return directory


def test_both_models_are_quantized_and_say_so(specializer):
    pair = specializer.pair
    assert [quantized_name(model.params) for model in (pair.cloud, pair.edge)] == ["int8", "nf4"]
    assert [precision_of(model) for model in (pair.cloud, pair.edge)] == [
        "float32, int8 weights",
        "float32, nf4 weights",
    ]


def test_a_merge_into_quantized_weights_is_refused(specializer):
    adapter = specializer.adapter(specializer.specialize([PROMPT])[0])
    with raises(ConfigError, "edge.weights", "edge.weights", "nf4", "--edge.weights", "bfloat16", code="quantized"):
        merge(specializer.pair.edge.params, adapter)


def test_an_answer_is_the_side_paths(config, specializer, special, capsys, tmp_path):
    edge = specializer.pair.edge
    ids = [edge.encoder.text("what kind is the sun ?")]
    adapter = specializer.adapter(specializer.specialize([PROMPT])[0])
    (expected,) = generate(edge.plain.replace(adapter=adapter), ids, GenerationSettings(6))
    asked = ["--max-new-tokens", "6"]
    capsys.readouterr()
    main(["generate", "--specialization", str(special), "--input", "what kind is the sun ?", *asked])
    assert capsys.readouterr().out.strip() == edge.encoder.decode(expected.ids).strip()
    # Of many requests too, which would be merged where they are all of one specialization.
    requests = write_rows(tmp_path / "requests.jsonl", [{"input": "what kind is the sun ?"}] * 2)
    flags = ["--requests", str(requests), "--specialization", str(special), *asked]
    main(["generate", *flags, "--out", str(tmp_path / "answers.jsonl")])
    answers = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers == [edge.encoder.decode(expected.ids)] * 2
    merged = [*flags, "--how", "merged", "--out", tmp_path / "merged.jsonl"]
    refused(capsys, lambda args: main(["generate", *args]), merged, "edge.weights", "nf4")


def test_an_export_is_of_the_weights_as_they_are_stored(config, specializer, special, tmp_path):
    main(["export", "--specialization", str(special), "--format", "merged", "--out", str(tmp_path / "merged")])
    base = load_params(config.edge.source)
    expected = merge(base, specializer.adapter(specializer.specialize([PROMPT])[0]))
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "merged"), expected)
    assert "nf4" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("weights", ["nf4", "auto"])
def test_a_method_is_scored_beside_quantized_weights_and_merged_into_others(config, specializer, weights):
    """The generator that was trained beside nf4 fits the same model's floats."""
    config = dataclasses.replace(config, edge=dataclasses.replace(config.edge, weights=weights))
    make = METHODS["lora_gen"].specialize(config, load_pair(config), specializer.loaded)
    found = make(Prompt(PROMPT, (), False))
    assert (found.adapter is None) == (weights == "auto")
    assert quantized_name(found.params) == (None if weights == "auto" else "nf4")


def test_a_format_that_is_none_is_named():
    with raises(ConfigError, "edge.weights", "edge.weights", "'int4'", "'int8'", "'nf4'", code="type"):
        check(Config(name="x", edge=ModelConfig(weights="int4")))
