"""Queries as the edge model reads them: plain texts, and conversations through the tokenizer's template."""

import pytest
from helpers import raises, write_tokenizer

from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.decoder.pretrained import load_tokenizer
from lora_gen_jax.errors import ModelError

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def encoder(tmp_path):
    size = write_tokenizer(tmp_path)
    return Encoder(load_tokenizer(str(tmp_path)), size)


def test_a_conversation_is_read_turn_by_turn_as_when_it_is_served(encoder):
    turns = (("user", "red"), ("assistant", "blue"), ("user", "green"))
    example = Example("1", "User: red\nAssistant: blue\nUser: green", "yellow", turns=turns)
    with raises(ModelError, "chat_template"):
        encoder.query(example, chat=True)
    encoder.tokenizer.chat_template = TEMPLATE
    query, response = encoder.query(example, chat=True)
    assert query == encoder.chat([{"role": role, "content": content} for role, content in turns])
    assert response == encoder.tokenizer("yellow", add_special_tokens=False)["input_ids"]
    one, _ = encoder.query(Example("2", "red", "blue"), chat=True)
    assert one == encoder.chat([{"role": "user", "content": "red"}])


def test_a_text_with_more_characters_than_its_tokens_can_have_is_known_unread(encoder):
    assert encoder.longest_token == 32  # "question" and "<unk>" are shorter
    assert not encoder.exceeds(64, 2)
    assert encoder.exceeds(65, 2)
    encoder.tokenizer.add_tokens(["x" * 100])
    del encoder.longest_token
    assert not encoder.exceeds(200, 2)
