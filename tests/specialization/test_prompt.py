"""Prompts with their examples kept apart: what is read of them, and what is said about those that cannot be."""

import pytest
from helpers import raises

from lora_gen_jax.data.prompts import system_prompt
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.errors import DataError
from lora_gen_jax.specialization.prompt import Prompt

PAIRS = [("hot", "cold"), ("big", "small"), ("yes", " no")]


def test_examples_are_read_as_shots():
    prompt = Prompt("Give the opposite.", PAIRS)
    assert prompt.text() == "Give the opposite.\n\nhot\ncold\n\nbig\nsmall\n\nyes no"
    assert prompt.text() == system_prompt("Give the opposite.", [Example("", q, r) for q, r in PAIRS])
    assert Prompt(examples=PAIRS[:1]).text() == "hot\ncold"
    assert Prompt("Alone.").text() == "Alone."
    assert Prompt("d", [Example("id", "hot", "cold")]).shots == (Example("id", "hot", "cold"),)


@pytest.mark.parametrize("room", range(8))
def test_as_many_examples_are_read_as_fit(room):
    pairs = [(f"q{i}", f"r{i}") for i in range(5)]
    described = Prompt("d", pairs).text(lambda text: text.count("q") <= room)
    assert described.count("q") == min(room, 5)
    alone = Prompt("", pairs).text(lambda text: text.count("q") <= room)
    assert alone.count("q") == min(max(room, 1), 5)
    assert alone.startswith("q0\nr0")


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Prompt(), "prompt"),
        (lambda: Prompt(" \n", []), "prompt"),
        (lambda: Prompt("d", [("a", "b"), ("c", " ")]), "examples.1.output"),
        (lambda: Prompt("d", [("", "b")]), "examples.0.input"),
        (lambda: Prompt("d", [("a", "b", "c")]), "examples.0"),
        (lambda: Prompt("d", [("a", 3)]), "examples.0"),
        (lambda: Prompt("d", ["ab"]), "examples.0"),
        (lambda: Prompt("d", "ab"), "examples"),
        (lambda: Prompt("d", [("a", "\ud800b")]), "examples.0.output"),
        (lambda: Prompt("\ud800"), "description"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(make, field):
    with raises(DataError, field):
        make()
