"""The base model with the prompt beside the specialized model without: what both answer, read and cost."""

import dataclasses
import json

import pytest
from helpers import raises

from lora_gen_jax.cli import main
from lora_gen_jax.config import Config, ModelConfig
from lora_gen_jax.data.pocket.agent import MARKER
from lora_gen_jax.errors import CheckpointError, DataError, OutputError
from lora_gen_jax.lab import side_by_side
from lora_gen_jax.lab.side_by_side import (
    Case,
    Comparison,
    Side,
    SideBySide,
    built_in_cases,
    shown_answer,
    side_by_side_command,
)
from lora_gen_jax.models import load_model
from lora_gen_jax.training.checkpoint import load_checkpoint
from lora_gen_jax.training.portable import SHIPPED


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(side_by_side, "REPEATS", 1)


def test_the_shipped_generator_plays_a_role(tmp_path, capsys):
    """The command, with the built-in role given as a user's prompt."""
    out, prompt = tmp_path / "found.json", tmp_path / "prompt.txt"
    role = built_in_cases(load_checkpoint(SHIPPED["quickstart"]).config)[1]
    prompt.write_text(role.prompt)
    flags = ["--input", role.input, "--max-new-tokens", "8", "--json", str(out)]
    main(["side_by_side", "--checkpoint", "quickstart", "--prompt", f"@{prompt}", *flags])
    found = json.loads(out.read_text())
    (case,) = found["cases"]
    assert found["checkpoint"]["step"] == 1500
    assert case["case"] == {"name": "prompt", "prompt": role.prompt, "input": role.input, "remark": ""}
    base, specialized = case["base"], case["specialized"]
    assert specialized["answer"].strip() == "[owlet]"
    assert specialized["finish"] == "stop"
    assert base["answer"].strip().startswith("[owlet]")
    encoder = load_model(ModelConfig("pocket-edge")).encoder
    assert base["context_tokens"] == len(encoder.text(f"{role.prompt}\n\n{role.input}"))
    assert specialized["context_tokens"] == len(encoder.text(role.input)) < base["context_tokens"] / 5
    assert specialized["new_tokens"] < base["new_tokens"] <= 8
    for times in ((side["first_token_ms"], side["answer_ms"]) for side in (base, specialized)):
        assert min(times) > 0
    assert min(case["cloud_ms"], case["merge_ms"]) > 0
    table = capsys.readouterr().out
    for text in (
        "reads prompt and input",
        "reads the input alone",
        "[owlet]",
        "first token, ms",
        "Once for this prompt",
    ):
        assert text in table


def test_the_pocket_pair_gets_prompts_of_its_own_kind():
    tools, role = built_in_cases(load_checkpoint(SHIPPED["quickstart"]).config)
    assert tools.input.startswith(MARKER)
    assert "> " in tools.prompt
    assert "None of these calls tools" in tools.remark
    assert "pocket in 1500 steps" in role.remark


def test_other_models_get_prompts_in_plain_words():
    config = Config(edge=ModelConfig("smollm2-135m"))
    tools, role = built_in_cases(config)
    assert "TOOLS:" in tools.prompt
    assert MARKER not in tools.prompt
    assert tools.input.startswith(MARKER)
    assert "Answer as Mirabel" in role.prompt
    assert "arc_easy" in role.remark
    pocket = built_in_cases(Config(edge=ModelConfig("pocket-edge")))
    assert {case.prompt for case in pocket}.isdisjoint({tools.prompt, role.prompt})
    agents = dataclasses.replace(config, data=dataclasses.replace(config.data, tasks=("pocket_agent",)))
    assert "None of these" not in built_in_cases(agents)[0].remark


def test_when_the_specialization_pays():
    sides = [Side("x", "stop", n, 1, ms, 2 * ms) for n, ms in ((100, 30.0), (10, 10.0))]
    assert Comparison(Case("a", "b", "c"), sides[0], sides[1], 90, 45.0, 5.0).pays_after == pytest.approx(2.5)
    assert Comparison(Case("a", "b", "c"), sides[1], sides[0], 90, 45.0, 5.0).pays_after is None


def test_answers_that_end_at_once_or_at_the_limit_are_marked():
    assert shown_answer(Side("", "stop", 2, 0, 1, 1)) == "(nothing: it ends at once)"
    assert shown_answer(Side(" one two", "length", 2, 2, 1, 1)) == "one two …"
    assert shown_answer(Side(" one", "stop", 2, 1, 1, 1)) == "one"


@pytest.mark.parametrize(
    ("flags", "field", "code", "facts"),
    [
        ({"prompt": "say it"}, "--input", "missing", ("--prompt", "--input")),
        ({"prompt": "say it", "input": " "}, "--input", "empty", ("--input",)),
        ({"max_new_tokens": 0}, "--max-new-tokens", None, ("--max-new-tokens", 0)),
        ({"prompt": "owl " * 300, "input": "owl:"}, "prompts.0", "too long", (256,)),
    ],
)
def test_bad_flags_are_refused(flags, field, code, facts):
    with raises(DataError, field, *facts, code=code):
        side_by_side_command(SideBySide(**{"checkpoint": SHIPPED["quickstart"], **flags}))


def test_a_template_without_a_system_turn_is_named(monkeypatch):
    sides = side_by_side.Sides(load_checkpoint(SHIPPED["quickstart"]), 8, chat=True)
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    monkeypatch.setattr(sides.pair.edge.encoder.tokenizer, "chat_template", template)
    with raises(DataError, "--chat", "(System role not supported)", "--chat"):
        sides.contexts(Case("x", "Say it.", "owl"))


def test_a_json_file_that_cannot_be_written_is_noticed_first(tmp_path):
    with raises(OutputError, "--json", "--json", code="unwritable"):
        side_by_side_command(SideBySide(json=tmp_path / "no" / "such.json"))


def test_a_method_without_a_prompt_is_refused(monkeypatch):
    loaded = load_checkpoint(SHIPPED["quickstart"])
    other = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, method="lora"))
    monkeypatch.setattr("lora_gen_jax.training.checkpoint.load_checkpoint", lambda path: other)
    with raises(CheckpointError, "method", "lora_gen"):
        side_by_side_command(SideBySide())
