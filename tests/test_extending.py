"""A method, a family of models, a task and an export format, each one file of a package of its own and one line."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import CLOUD, WORDS, experiment, generator_variables, prompts_of, random_params, write_model, write_rows
from safetensors.numpy import load_file, save_file

from lora_gen_jax.adapters.specialization import Specialization, save_specialization
from lora_gen_jax.adapters.specialization_fit import pool_fingerprint
from lora_gen_jax.config import ModelConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.data.reasoning import REASONING_TASKS
from lora_gen_jax.decoder.families import FAMILIES
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import fingerprint, load_config, load_params
from lora_gen_jax.evaluation.run import evaluate
from lora_gen_jax.export.command import Export, export_command
from lora_gen_jax.export.formats import FORMATS
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.lab.costs.methods import answering
from lora_gen_jax.lab.report.style import title_of
from lora_gen_jax.methods.registry import METHODS
from lora_gen_jax.training.checkpoint import Loaded
from lora_gen_jax.training.loop import train
from lora_gen_jax.training.portable import save_portable

ROOT = Path(__file__).parents[1]
FAMILY = """
from lora_gen_jax.decoder.family import LLAMA_NAMES, Family, rotary

FAMILY = Family(
    "lifted",
    "LlamaForCausalLM",
    lambda hf: rotary(hf | {"intermediate_size": hf["lifted_size"]}) | {"embedding_scale": 2.0},
    {**LLAMA_NAMES, "up": "mlp.lift"},
)
"""
TASK = """
from lora_gen_jax.data.rows import Files, ReasoningTask, multiple_choice


def example(example_id, row):
    return multiple_choice(example_id, row["riddle"], row["answers"], row["gold"])


TASK = ReasoningTask("riddles", example, Files(("Riddles-1.0",)), ("say the kind of the animal",))
"""
FORMAT = """
import numpy as np

from lora_gen_jax.export.formats import Format


def write_arrays(adapter, directory, dtype):
    arrays = {f"{name}.{side}": x for name, a, b in adapter.modules() for side, x in (("a", a), ("b", b))}
    np.savez(directory / "arrays.npz", **{name: x.astype(dtype) for name, x in arrays.items()})


FORMAT = Format("NumPy arrays", write_arrays, lambda out: f"numpy.load({str(out / 'arrays.npz')!r})")
"""


@pytest.fixture(autouse=True)
def _extension(tmp_path, monkeypatch):
    """The package, and the line of each in its registry."""
    method = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert method is not None
    package = tmp_path / "an_extension"
    package.mkdir()
    files = {"__init__": "", "scales": method[1], "lifted": FAMILY, "riddles": TASK, "arrays": FORMAT}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from an_extension import lifted, riddles, scales  # pyright: ignore[reportMissingImports]

    monkeypatch.setitem(METHODS, "scales", scales.METHOD)
    monkeypatch.setitem(FAMILIES, "lifted", lifted.FAMILY)
    monkeypatch.setitem(REASONING_TASKS, "riddles", riddles.TASK)
    monkeypatch.setitem(FORMATS, "arrays", ("an_extension.arrays", "arrays that NumPy reads"))


@pytest.fixture
def model(tmp_path):
    """A model of the new family: a llama, whose tensors and sizes have other names."""
    directory = write_model(tmp_path / "lifted_model")
    hf = json.loads((directory / "config.json").read_text())
    hf |= {"model_type": "lifted", "lifted_size": hf.pop("intermediate_size")}
    (directory / "config.json").write_text(json.dumps(hf))
    tensors = load_file(directory / "model.safetensors")
    renamed = {name.replace("up_proj", "lift"): x for name, x in tensors.items()}
    save_file(renamed, directory / "model.safetensors")
    return directory


def test_a_model_of_a_new_family_is_read(model, tmp_path):
    llama = write_model(tmp_path / "llama")
    config, known = load_config(model), load_config(llama)
    assert config == dataclasses.replace(known, family="lifted", embedding_scale=2.0)
    jax.tree.map(np.testing.assert_array_equal, load_params(model, config), load_params(llama, known))


def test_a_new_method_is_trained_and_scored_on_a_new_task_with_a_new_model(model, tmp_path):
    rows = [{"riddle": f"what kind is the {word} ?", "answers": ["bird", "fish"], "gold": 0} for word in WORDS[:12]]
    (tmp_path / "data" / "Riddles-1.0").mkdir(parents=True)
    write_rows(tmp_path / "data" / "Riddles-1.0" / "train.jsonl", rows[:9])
    write_rows(tmp_path / "data" / "Riddles-1.0" / "validation.jsonl", rows[9:])
    config, edge = experiment(tmp_path, tmp_path / "run", steps=1), ModelConfig(str(model), dtype="float32")
    data = dataclasses.replace(config.data, tasks=("riddles",), files=(), dir=tmp_path / "data")
    scored = dataclasses.replace(config.eval, tasks=("riddles",), methods=("base", "scales"), shots=1, latency=False)
    config = check(dataclasses.replace(config, method="scales", edge=edge, cloud=edge, data=data, eval=scored))
    train(config)
    results = evaluate(config, None, tmp_path / "out")["methods"]
    assert [results[name]["tasks"]["riddles"]["n"] for name in ("base", "scales")] == [3, 3]
    assert results["scales"]["ave_unseen"] == results["scales"]["tasks"]["riddles"]["acc"]
    assert title_of("scales") == "scales"
    assert "scales" in answering()


def test_a_specialization_is_exported_in_a_new_format(model, tmp_path, capsys):
    config, settings = load_config(model), experiment(tmp_path, tmp_path).generator
    generator = LoRAGen(Decoder(CLOUD), config, settings)
    prompts = prompts_of([4], 1, 16, config.num_layers)
    variables = generator_variables(generator, random_params(CLOUD), prompts)
    prints = {"cloud": "c" * 16, "edge": fingerprint(model), "pool": pool_fingerprint(variables)}
    gates = {"index": np.array([[1, 3], [0, 2]], np.uint8), "weight": np.full((2, 2), 0.5, np.float32)}
    save_specialization(Specialization(gates, prints, "a prompt", None, {"jax": "1"}), tmp_path / "special")
    of_run = dataclasses.replace(experiment(tmp_path, tmp_path), edge=ModelConfig(str(model), dtype="float32"))
    save_portable(Loaded(1, variables, of_run, prints, {}, tmp_path), tmp_path / "generator", np.float32)
    export_command(Export("arrays", tmp_path / "out", tmp_path / "special", tmp_path / "generator", dtype="float16"))
    arrays = np.load(tmp_path / "out" / "arrays.npz")
    assert arrays["model.layers.1.mlp.lift.a"].shape == (settings.top_k * settings.rank, config.width)
    assert {x.dtype for x in arrays.values()} == {np.dtype(np.float16)}
    assert "NumPy arrays of rank 8" in capsys.readouterr().err
