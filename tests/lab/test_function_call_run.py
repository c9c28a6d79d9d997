"""The agent command with function calls: two methods, files as columns, rows that do not fit, and what is refused."""

import dataclasses
import json

import pytest
from helpers import raises, trained, write_config, write_rows

from lora_gen_jax.errors import CheckpointError, DataError
from lora_gen_jax.lab.agent import function_calls
from lora_gen_jax.lab.agent.command import agent_main
from lora_gen_jax.training.checkpoint import load_checkpoint


def row(name, gold, description="says it"):
    color = {"type": "string", "description": "which"}
    function = {"name": "say", "description": description, "parameters": {"properties": {"color": color}}}
    question = [[{"role": "user", "content": "what color is the sun ?"}]]
    return {"id": name, "question": question, "function": [function], "ground_truth": gold}


@pytest.fixture
def arguments(tmp_path):
    """Of a command with two files; one row of three is too long for the models."""
    gold = [{"say": {"color": ["red"]}}]
    write_rows(tmp_path / "bfcl_simple.jsonl", [row("a", gold), row("b", gold, "red " * 90), row("c", gold)])
    write_rows(tmp_path / "bfcl_irrelevance.jsonl", [row("d", [])])
    config = write_config(tmp_path / "tiny.py", dataclasses.replace(trained(), workdir=tmp_path / "run"))
    return [str(a) for a in (config, "--bfcl", tmp_path, "--checkpoint", trained().directory)]


def test_both_methods_on_every_file(arguments, tmp_path, monkeypatch, capsys):
    made = {"base_with_tools": 'say(color="red")', "lora_gen": "no call"}

    def write(writer, method, tasks, progress):
        name = "base_with_tools" if method.reads_prompt else "lora_gen"
        found = real(writer, method, tasks, progress)
        return [dataclasses.replace(one, text=f"\nSure.\n\n{made[name]}\n\nUser: more\nsay()") for one in found]

    real = function_calls.Writer.write
    monkeypatch.setattr(function_calls.Writer, "write", write)
    agent_main([*arguments, "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "bfcl.json").read_text())
    assert report["skipped"] == {"simple": 1}
    exact = {m: {c: v["exact"] for c, v in files.items()} for m, files in report["methods"].items()}
    assert exact == {
        "base_with_tools": {"irrelevance": 0, "simple": 1},
        "lora_gen": {"irrelevance": 1, "simple": 0},
    }
    for name, files in report["methods"].items():
        assert [v["n"] for v in files.values()] == [1, 2]
        assert all((v["compression"] > 5) == (name == "lora_gen") for v in files.values())
        outputs = {one["id"]: one for one in report["outputs"][name]}
        assert list(outputs) == ["d", "a", "c"]
        assert outputs["a"]["output"] == f"Sure.\n\n{made[name]}"
        assert outputs["a"]["gold"] == 'say(color="red")'
    printed = capsys.readouterr().out
    assert "LoRA-Gen, no functions in context" in printed
    assert "left out, too long for the models: simple 1" in printed
    assert not (tmp_path / "run" / "lora_gen").exists()


def test_the_generator_of_the_agent_run_is_found_first(tmp_path, monkeypatch):
    asked = []
    loaded = load_checkpoint(trained().directory)
    monkeypatch.setattr(function_calls, "load_checkpoint", lambda path: asked.append(path) or loaded)
    config = dataclasses.replace(trained(), workdir=tmp_path)
    (tmp_path / "lora_gen").mkdir()
    assert function_calls.find_generator(config, None) is loaded
    assert asked == [tmp_path / "lora_gen"]
    other = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, method="lora"))
    monkeypatch.setattr(function_calls, "load_checkpoint", lambda path: other)
    with raises(CheckpointError, "method", "method lora, not lora_gen"):
        function_calls.find_generator(config, None)


def test_nothing_that_fits_is_an_error(arguments):
    with raises(DataError, "rows", "4 rows", "task bfcl/d"):
        agent_main([*arguments, "--eval.prompt-limit", "20"])
