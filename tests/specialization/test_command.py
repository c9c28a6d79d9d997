"""The commands that refine: with a prompt, or from a directory; what they print, and what they refuse."""

import json
import re

import numpy as np
import pytest
from helpers import refused, trained, write_rows

from lora_gen_jax.adapters.specialization import load_specialization
from lora_gen_jax.cli import main

THINGS = ("sun", "moon", "star", "cat", "dog", "bird")
ROWS = [{"input": f"what kind is the {thing} ?", "output": "blue"} for thing in THINGS]
SAID = (
    r"(\d+) examples, (\d+) steps on the ([\w ]+), [\d.]+ s; loss ([\d.]+) before, ([\d.]+) after \(nats a token\);"
    r" (\d+) bytes"
)


@pytest.fixture
def examples(tmp_path):
    return write_rows(tmp_path / "examples.jsonl", ROWS)


def specialize(out, *flags):
    main(["specialize", "--checkpoint", str(trained().directory), "--out", str(out), *map(str, flags)])


def answer(capsys, directory):
    capsys.readouterr()
    main(
        ["generate", "--specialization", str(directory), "--input", "what kind is the apple ?", "--max-new-tokens", "3"]
    )
    return capsys.readouterr().out.split()[:1]


@pytest.mark.parametrize("kind", ["gates", "both"])
def test_examples_are_read_and_learned_from(capsys, tmp_path, examples, kind):
    prompt = ("--prompt", "say the color of the sun", "--examples", examples)
    specialize(tmp_path / "read", *prompt, "--steps", 0)
    assert re.search(r"read: \d+ prompt tokens became \d+ bytes", capsys.readouterr().err)
    read = load_specialization(tmp_path / "read")
    assert read.refined is None
    assert read.prompt.startswith("say the color of the sun\n\nwhat kind is the sun ?\nblue\n\nwhat kind")
    specialize(tmp_path / "made", *prompt, "--refine", kind, "--steps", 6)
    found = re.search(SAID, capsys.readouterr().err)
    assert found is not None
    assert found.group(1, 2, 3) == (("6", "8", "gates and a lora") if kind == "both" else ("6", "6", kind))
    assert float(found[5]) < float(found[4])
    made = load_specialization(tmp_path / "made")
    assert made.prompt == read.prompt
    assert made.refined is not None
    assert made.refined["loss_after"] == pytest.approx(float(found[5]), abs=1e-3)
    assert bool(made.factors) == (kind == "both")


def test_a_specialization_is_refined_again_and_answers_as_its_examples_do(capsys, tmp_path, examples):
    specialize(tmp_path / "warm", "--prompt", "say the color of the sun\n\nwhat kind is the star ?\nred")
    assert answer(capsys, tmp_path / "warm") == ["red"]
    special = ("--specialization", str(tmp_path / "warm"), "--examples", str(examples))
    main(["refine", *special, "--refine", "lora", "--steps", "60", "--out", str(tmp_path / "blue")])
    found = re.search(SAID, capsys.readouterr().err)
    assert found is not None
    assert float(found[5]) < float(found[4])
    assert answer(capsys, tmp_path / "blue") == ["blue"]
    main(["refine", *special, "--out", str(tmp_path / "gates")])
    gates = load_specialization(tmp_path / "gates")
    assert gates.refined is not None
    assert gates.refined["kind"] == "gates"
    before = load_specialization(tmp_path / "warm")
    assert (gates.prompt, gates.fingerprints) == (before.prompt, before.fingerprints)
    assert np.any(gates.gates(4).dense() != before.gates(4).dense())
    readable = json.loads((tmp_path / "gates" / "specialization.json").read_text())
    assert readable["refined"] == gates.refined


def test_examples_need_no_description(tmp_path, examples):
    specialize(tmp_path / "s", "--examples", examples, "--steps", 1)
    assert load_specialization(tmp_path / "s").prompt.startswith("what kind is the sun ?\nblue")


def test_many_learn_together_and_those_without_examples_are_read(capsys, tmp_path):
    rows = [
        {"name": "learned", "description": "say the color of the sun", "examples": ROWS},
        {"name": "alone", "examples": ROWS[:2]},
        {"name": "read", "prompt": "say one two three"},
    ]
    many = write_rows(tmp_path / "many.jsonl", rows)
    specialize(tmp_path / "made", "--prompts", many, "--steps", 3)
    said = re.search(
        r"3 specializations .* of gates; 2 learned from examples, mean loss ([\d.]+) before, ([\d.]+) after",
        capsys.readouterr().err,
    )
    assert said is not None
    assert float(said[2]) < float(said[1])
    made = {name: load_specialization(tmp_path / "made" / name) for name in ("learned", "alone", "read")}
    assert [one.refined is None for one in made.values()] == [False, False, True]
    assert made["read"].prompt == "say one two three"
    specialize(
        tmp_path / "one",
        "--prompt",
        "say the color of the sun",
        "--examples",
        write_rows(tmp_path / "e.jsonl", ROWS),
        "--steps",
        3,
    )
    one = load_specialization(tmp_path / "one")
    assert one.prompt == made["learned"].prompt
    # Sums over rows of another shape: 1e-4 of a step of 0.2, three times.
    np.testing.assert_allclose(one.gates(4).dense(), made["learned"].gates(4).dense(), atol=3 * 1e-4 * 0.2)
    specialize(tmp_path / "plain", "--prompts", many, "--steps", 0)
    assert load_specialization(tmp_path / "plain" / "learned").refined is None
    rows[2]["examples"] = ROWS
    two = write_rows(tmp_path / "two.jsonl", rows)
    refused(
        capsys, main, ["specialize", "--prompts", two, "--out", tmp_path / "out"], "two.jsonl:3", "examples", "prompt"
    )


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ('{"input": "a"}', "output"),
        ('{"input": "a", "output": " "}', "output"),
        ('{"input": 3, "output": "b"}', "input"),
        ('["a", "b"]', "object"),
        ('{"input": "a",', "JSON"),
    ],
)
def test_a_bad_row_is_named_by_its_line(capsys, tmp_path, examples, line, fact):
    rows = examples.read_text().splitlines()
    examples.write_text("\n".join([*rows[:2], line, *rows[2:]]) + "\n")
    for command in (["specialize"], ["refine", "--specialization", tmp_path / "none"]):
        args = [*command, "--examples", examples, "--out", tmp_path / "out"]
        refused(capsys, main, args, "examples.jsonl:3", fact)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--shots", "FILE"], ["--shots", "--examples"]),
        (["--prompt", "x", "--prompts", "FILE"], ["--prompt", "--examples", "--prompts"]),
        (["--steps", "-1"], ["refine.steps", "-1"]),
        (["--steps", "2000"], ["refine.steps", "2000"]),
    ],
)
def test_flags_that_do_not_fit_are_named(capsys, tmp_path, examples, flags, facts):
    flags = [examples if flag == "FILE" else flag for flag in flags]
    refused(capsys, main, ["specialize", "--examples", examples, "--out", tmp_path / "out", *flags], *facts)


def test_steps_need_examples(capsys, tmp_path, examples):
    out = ["--out", tmp_path / "out"]
    for flags in (["--steps", 3], ["--refine", "lora"], ["--as-chat"]):
        refused(capsys, main, ["specialize", "--prompt", "x", *flags, *out], flags[0], "--examples")
    missing = tmp_path / "none"
    refused(capsys, main, ["refine", "--specialization", missing, "--examples", examples, *out], missing)
    missing = tmp_path / "no.jsonl"
    refused(capsys, main, ["refine", "--specialization", tmp_path, "--examples", missing, *out], missing)
    assert not (tmp_path / "out").exists()
