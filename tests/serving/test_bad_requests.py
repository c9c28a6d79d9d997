"""Bad requests: each is an error of the client, in OpenAI's JSON, that names the field."""

import json

import httpx
import pytest
from pydantic import ValidationError
from serving_tools import KEY

from lora_gen_jax.serving.bodies import read_request
from lora_gen_jax.serving.errors import ApiError
from lora_gen_jax.serving.schemas import Chat, Completion, Message, NewSpecialization

QUESTION = "what color is the sun ?"

BAD = [
    ({"model": "none"}, 404, "model", "none"),
    ({"model": "RED"}, 404, "model", "RED"),
    ({"model": ""}, 400, "model", "model"),
    ({"model": None}, 400, "model", "missing"),
    ({"model": 3}, 400, "model", "string"),
    ({"model": "auto"}, 400, "model", "chat"),
    ({"prompt": None}, 400, "prompt", "missing"),
    ({"prompt": ""}, 400, "prompt", "empty"),
    ({"prompt": []}, 400, "prompt", "list"),
    ({"prompt": [[]]}, 400, "prompt", "list"),
    ({"prompt": ["a", 1]}, 400, "prompt", "list"),
    ({"prompt": [True]}, 400, "prompt", "list"),
    ({"prompt": [10**30]}, 400, "prompt", "embedding"),
    ({"prompt": [-1]}, 400, "prompt", "embedding"),
    ({"prompt": "cat " * 96}, 400, None, "limit of both is 96"),
    ({"prompt": ["cat"] * 33}, 400, "prompt", "limit is 32"),
    ({"max_tokens": 0}, 400, "max_tokens", "greater"),
    ({"max_tokens": 25}, 400, "max_tokens", "limit is 24"),
    ({"max_tokens": 10**40}, 400, "max_tokens", "limit is 24"),
    ({"max_tokens": "10"}, 400, "max_tokens", "integer"),
    ({"max_tokens": True}, 400, "max_tokens", "integer"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "integer"),
    ({"temperature": -0.1}, 400, "temperature", "greater"),
    ({"temperature": 2.1}, 400, "temperature", "less"),
    ({"temperature": "hot"}, 400, "temperature", "number"),
    ({"top_p": 0}, 400, "top_p", "greater"),
    ({"top_k": -2}, 400, "top_k", "greater"),
    ({"top_k": 2**40}, 400, "top_k", "less"),
    ({"n": 9}, 400, "n", "less"),
    ({"seed": 2**70}, 400, "seed", "less"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "at most 4"),
    ({"stop": [""]}, 400, "stop", "empty"),
    ({"stop": "x" * 1001}, 400, "stop", "1000"),
    ({"stream": "yes"}, 400, "stream", "boolean"),
    ({"stream_options": {"usage": True}}, 400, "stream_options.usage", "unknown field"),
    ({"logprobs": 5}, 400, "logprobs", "less"),
    ({"echo": True}, 400, "echo", "not supported"),
    ({"best_of": 4}, 400, "best_of", "not supported"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
    ({"tempurature": 0.5}, 400, "tempurature", "did you mean temperature?"),
    ({"surprise": None}, 400, "surprise", "unknown field"),
    ({"s" * 5000: 1}, 400, "s" * 100, "unknown field"),
]


@pytest.mark.parametrize(("fields", "status", "param", "words"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_named(client, fields, status, param, words):
    answer = client.post("/v1/completions", json={"model": "red", "prompt": QUESTION, **fields})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


BODIES = [
    b"",
    b"{",
    b"[1]",
    b"null",
    b'{"model": "red", "prompt": "sun", "temperature": NaN}',
    b'{"model": "red", "prompt": "sun", "temperature": Infinity}',
    b'{"model": "red", "prompt": "sun", "temperature": 1e999}',
    b'{"model": "red", "prompt": "sun", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"model": "red", "prompt": "\\ud800"}',
    b'{"model": "red\\udfff", "prompt": "sun"}',
    b'{"model": "red", "prompt": "\xff"}',
    b'{"model": "red", "prompt": "\xed\xa0\x80"}',
    '{"model": "red", "prompt": "sun"}'.encode("utf-16"),
    '{"model": "red", "prompt": "\\ud800"}'.encode("utf-16-le"),
    '{"model": "red", "prompt": "\ud800"}'.encode("utf-16-be", "surrogatepass"),
    b"[" * 9000,
    b'{"model": "red", "prompt": ' + b"[" * 4000 + b"]" * 4000 + b"}",
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:60]))
def test_a_body_that_cannot_be_read_is_an_error_of_the_client(client, body):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/specializations"):
        answer = client.post(path, content=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_is_read_to_its_limit_only(client):
    large = json.dumps({"model": "red", "prompt": "cat " * 10000}).encode()
    parts = (large[i : i + 1000] for i in range(0, len(large), 1000))  # without a Content-Length
    for content in (large, parts):
        answer = client.post("/v1/completions", content=content)
        assert answer.status_code == 413
        assert "20000" in answer.json()["error"]["message"]


CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [3]}, "messages.0"),
    ({"messages": [{"role": "user", "content": "a", "surprise": None}]}, "messages.0.surprise"),
    ({"messages": [{"role": "user", "content": "a", "refusal": "no"}]}, "messages.0.refusal"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"model": "auto"}, "messages"),
    ({"model": "auto", "messages": [{"role": "system", "content": "say red"}]}, "messages"),
    ({"max_completion_tokens": 25}, "max_completion_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), CHATS, ids=lambda value: str(value)[:50])
def test_a_bad_chat_is_named(client, fields, param):
    request = {"model": "red", "messages": [{"role": "user", "content": "sun"}], **fields}
    answer = client.post("/v1/chat/completions", json=request)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Chat, {"messages": [0] * 300_000}),
        (Chat, {"messages": [{"role": "user", "content": "a"}] * 5000}),
        (NewSpecialization, {"messages": [{}] * 300_000}),
        (NewSpecialization, {"shots": [0] * 300_000}),
        (NewSpecialization, {str(number): 0 for number in range(100_000)}),
    ],
    ids=["numbers", "messages", "objects", "shots", "names"],
)
def test_of_many_mistakes_the_first_is_looked_at_alone(kind, fields):
    with pytest.raises(ApiError) as raised:
        read_request(kind, json.dumps({"model": "red", **fields} if kind is Chat else fields).encode())
    found = raised.value.__context__
    if isinstance(found, ValidationError):  # a list of hundreds of thousands takes seconds
        assert found.error_count() <= len(Message.model_fields)
    assert raised.value.status == 400


def test_a_byte_order_mark_is_no_mistake():
    body = json.dumps({"model": "red", "prompt": QUESTION}).encode("utf-8-sig")
    assert read_request(Completion, body).prompt == [QUESTION]


def test_a_key_is_needed(url, client):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer \xe9"}):
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("DELETE", "/v1/specializations/red")):
            answer = httpx.request(method, url + path, headers=raw)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(url + "/health").json() == {"status": "ok"}
    assert httpx.get(url + "/metrics").status_code == 200


def test_other_paths_and_methods_are_errors_in_json(client):
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("GET", "/docs", 404)):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
