"""Prompts with their examples kept apart: what is read of them, and what is said about those that cannot be."""

import pytest

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
    ("make", "words"),
    [
        (lambda: Prompt(), "the prompt is empty"),
        (lambda: Prompt(" \n", []), "the prompt is empty"),
        (lambda: Prompt("d", [("a", "b"), ("c", " ")]), "the output of example 2 is empty"),
        (lambda: Prompt("d", [("", "b")]), "the input of example 1 is empty"),
        (lambda: Prompt("d", [("a", "b", "c")]), "example 1 must be a pair of texts"),
        (lambda: Prompt("d", [("a", 3)]), "example 1 must be a pair of texts"),
        (lambda: Prompt("d", ["ab"]), "example 1 must be a pair of texts"),
        (lambda: Prompt("d", "ab"), "examples is one text"),
        (lambda: Prompt("d", [("a", "\ud800b")]), "the output of example 1 holds half of a surrogate pair"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(make, words):
    with pytest.raises(DataError, match=words):
        make()
