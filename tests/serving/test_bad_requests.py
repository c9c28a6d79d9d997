"""Bad requests: each is an error of the client, in OpenAI's JSON, that names the field."""

import json

import httpx
import pytest
from helpers import raises, unsaid
from pydantic import ValidationError
from serving_tools import KEY

from lora_gen_jax.serving import requests
from lora_gen_jax.serving.errors import ApiError
from lora_gen_jax.serving.requests import Chat, Completion, Message, NewSpecialization, read_request

QUESTION = "what color is the sun ?"
JSON = {"Content-Type": "application/json"}

BAD = [
    ({"model": "none"}, "model", "model_not_found", "'none'"),
    ({"model": "RED"}, "model", "model_not_found", "'RED'"),
    ({"model": ""}, "model", "invalid_value", "model"),
    ({"model": None}, "model", "missing_field", "model"),
    ({"model": 3}, "model", "invalid_value", "model"),
    ({"model": "auto"}, "model", None, "/v1/chat/completions"),
    ({"prompt": None}, "prompt", "missing_field", "prompt"),
    ({"prompt": ""}, "prompt", None, "text"),
    ({"prompt": []}, "prompt", "invalid_value", "prompt"),
    ({"prompt": [[]]}, "prompt", "invalid_value", "prompt"),
    ({"prompt": ["a", 1]}, "prompt", "invalid_value", "prompt"),
    ({"prompt": [True]}, "prompt", "invalid_value", "prompt"),
    ({"prompt": [10**30]}, "prompt", None, f"token id {10**30}"),
    ({"prompt": [-1]}, "prompt", None, "token id -1"),
    ({"prompt": "cat " * 96}, None, "context_length_exceeded", "96"),
    ({"prompt": ["cat"] * 33}, "prompt", None, "32"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value", "1"),
    ({"max_tokens": 25}, "max_tokens", None, "24"),
    ({"max_tokens": 10**40}, "max_tokens", None, "24"),
    ({"max_tokens": "10"}, "max_tokens", "invalid_value", "max_tokens"),
    ({"max_tokens": True}, "max_tokens", "invalid_value", "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_value", "max_tokens"),
    ({"temperature": -0.1}, "temperature", "invalid_value", "0"),
    ({"temperature": 2.1}, "temperature", "invalid_value", "2"),
    ({"temperature": "hot"}, "temperature", "invalid_value", "temperature"),
    ({"top_p": 0}, "top_p", "invalid_value", "0"),
    ({"top_k": -2}, "top_k", "invalid_value", "-1"),
    ({"top_k": 2**40}, "top_k", "invalid_value", "top_k"),
    ({"n": 9}, "n", "invalid_value", "8"),
    ({"seed": 2**70}, "seed", "invalid_value", "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value", "4"),
    ({"stop": [""]}, "stop", "invalid_value", "stop"),
    ({"stop": "x" * 1001}, "stop", "invalid_value", "1000"),
    ({"stream": "yes"}, "stream", "invalid_value", "stream"),
    ({"stream_options": {"usage": True}}, "stream_options.usage", "unknown_field", "stream_options.usage"),
    ({"logprobs": 5}, "logprobs", "invalid_value", "logprobs"),
    ({"echo": True}, "echo", "unsupported_value", "echo"),
    ({"best_of": 4}, "best_of", "unsupported_value", "best_of"),
    ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_value", "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_value", "logit_bias"),
    ({"tempurature": 0.5}, "tempurature", "unknown_field", "temperature"),
    ({"surprise": None}, "surprise", "unknown_field", "surprise"),
    ({"s" * 5000: 1}, "s" * 100, "unknown_field", "s" * 100),
]


@pytest.mark.parametrize(("fields", "param", "code", "fact"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_named(client, fields, param, code, fact):
    answer = client.post("/v1/completions", json={"model": "red", "prompt": QUESTION, **fields})
    assert answer.status_code == (404 if code == "model_not_found" else 400), answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert unsaid(error["message"], [fact]) == [], error
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
        answer = client.post(path, content=body, headers=JSON)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_is_read_to_its_limit_only(client):
    large = json.dumps({"model": "red", "prompt": "cat " * 10000}).encode()
    parts = (large[i : i + 1000] for i in range(0, len(large), 1000))  # without a Content-Length
    for content in (large, parts):
        answer = client.post("/v1/completions", content=content, headers=JSON)
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


@pytest.mark.parametrize("deep", [True, False])
def test_lists_are_counted_before_they_are_made(monkeypatch, deep):
    lists = b"[" * 100_000 + b"]" * 100_000 if deep else b"[" + b"[]," * 200_000 + b"[]]"
    monkeypatch.setattr(requests, "from_json", None)
    with raises(ApiError, None, 32768, code="too_many_values"):
        read_request(Completion, b'{"model": "red", "prompt": ' + lists + b"}")


@pytest.mark.timeout(20)
def test_brackets_of_texts_are_no_lists():
    text = '[{"\\' * 50_000
    assert read_request(Completion, json.dumps({"model": "red", "prompt": text}).encode()).prompt == [text]
    for half in (b'"\\"' * 300_000 + b"[" * 40_000, b"[" * 40_000 + b'"' + b'\\"' * 300_000):
        with raises(ApiError, None):
            read_request(Completion, b'{"prompt": ' + half)


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
