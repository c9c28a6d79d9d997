"""The HTTP interface on the real scheduler: answers equal those of merged weights, for OpenAI's own client, too."""

import json
import math
from typing import Any

import openai
import pytest
from serving_tools import KEY, MAX_NEW_TOKENS, PROMPTS

from lora_gen_jax.serving.replies import Piece, Reply, Token

GREEDY = {"temperature": 0, "max_tokens": 10}
QUESTION = "what color is the sun ?"


def complete(client, **fields):
    answer = client.post("/v1/completions", json={"model": "red", "prompt": QUESTION, **GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(text):
    """The data of server-sent events; the last must say that it is the last."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("name", ["base", *PROMPTS])
def test_an_answer_is_that_of_the_merged_model(client, offline, specializer, name):
    body, expected = complete(client, model=name), offline(name, QUESTION, 10)
    (choice,) = body["choices"]
    assert choice["text"] == specializer.pair.edge.encoder.decode(expected.ids)
    assert choice["finish_reason"] == expected.finish
    read = len(specializer.pair.edge.encoder.text(QUESTION))
    assert body["usage"]["prompt_tokens"] == read
    assert body["usage"]["completion_tokens"] == len(expected.ids)
    assert body["usage"]["total_tokens"] == read + len(expected.ids)
    assert (body["object"], body["model"]) == ("text_completion", name)


def test_specializations_differ(offline):
    assert len({tuple(offline(name, QUESTION, 10).ids) for name in ("base", *PROMPTS)}) > 1


def test_a_draw_is_that_of_generate_with_the_same_seed(client, offline, specializer):
    from lora_gen_jax.inference.sampling import Sampling

    drawn = complete(client, temperature=1.5, top_p=0.9, top_k=20, seed=11, n=3)
    decode = specializer.pair.edge.encoder.decode
    for choice in drawn["choices"]:
        seed = 11 + choice["index"]
        expected = offline("red", QUESTION, 10, sampling=Sampling(1.5, 20, 0.9), seed=seed)
        assert choice["text"] == decode(expected.ids)
    assert len({choice["text"] for choice in drawn["choices"]}) > 1


def test_several_prompts_and_choices_are_numbered_in_order(client, offline, specializer):
    encoder = specializer.pair.edge.encoder
    prompts = ["sun moon", "name a fish", "one two"]
    for given in (prompts, [encoder.text(text) for text in prompts]):
        body = complete(client, prompt=given, n=2)
        texts = [choice["text"] for choice in body["choices"]]
        expected = [encoder.decode(offline("red", text, 10).ids) for text in prompts for _ in range(2)]
        assert texts == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(6))
        assert body["usage"]["prompt_tokens"] == sum(len(encoder.text(text)) for text in prompts)
    assert complete(client, prompt=encoder.text(prompts[0]))["choices"][0]["text"] == expected[0]


def test_log_probabilities_are_the_models_own(client, offline, specializer):
    expected = offline("two", QUESTION, 10)
    for asked in (0, 1):
        (choice,) = complete(client, model="two", logprobs=asked)["choices"]
        said = choice["logprobs"]
        assert said["token_logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
        assert len(said["tokens"]) == len(said["text_offset"]) == len(expected.ids)
        assert said["text_offset"][0] == 0
    assert complete(client, model="two")["choices"][0]["logprobs"] is None


def test_part_of_a_character_has_no_bytes_of_its_own():
    tokens = [Token(" owl", -0.5, 0), Token("\ufffd", -0.5, 4)]
    answer = Reply("chat", "red", 1, logprobs=True).whole([Piece(0, "…", tokens, "stop")], 2)
    told = answer["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in told] == [[32, 111, 119, 108], None]


def test_a_stop_string_ends_an_answer_before_it(client, offline, specializer):
    text = specializer.pair.edge.encoder.decode(offline("red", QUESTION, 10).ids)
    stop = next(word for word in text.split() if not text.startswith(word))
    (choice,) = complete(client, stop=["never there", stop], logprobs=0)["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert all(offset < len(choice["text"]) for offset in choice["logprobs"]["text_offset"])
    assert complete(client, stop=stop)["choices"][0]["text"] == choice["text"]


@pytest.mark.parametrize("stop", [None, "the"])
def test_a_stream_joins_to_the_whole_answer(client, stop):
    fields = {"prompt": ["sun moon", "a cat"], "n": 2, "stop": stop, "logprobs": 0}
    whole = complete(client, **fields)
    request = {"model": "red", **GREEDY, **fields, "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/completions", json=request)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer.text)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        told = [token for c in own if c["logprobs"] for token in c["logprobs"]["tokens"]]
        assert told == (choice["logprobs"] or {"tokens": []})["tokens"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_chat_reads_the_template(client, offline, specializer):
    messages = [{"role": "user", "content": [{"type": "text", "text": "name "}, {"type": "text", "text": "a cat"}]}]
    body = client.post("/v1/chat/completions", json={"model": "cat", "messages": messages, "temperature": 0}).json()
    encoder = specializer.pair.edge.encoder
    expected = offline("cat", encoder.chat([{"role": "user", "content": "name a cat"}]), MAX_NEW_TOKENS)
    (choice,) = body["choices"]
    assert choice["message"]["content"] == encoder.decode(expected.ids)
    assert (choice["message"]["role"], choice["finish_reason"]) == ("assistant", expected.finish)
    streamed = {"model": "cat", "messages": messages, "temperature": 0, "stream": True, "max_completion_tokens": 5}
    first, *chunks = events(client.post("/v1/chat/completions", json=streamed).text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == encoder.decode(expected.ids[:5])
    assert first["object"] == "chat.completion.chunk"


def test_without_a_chat_template_a_chat_is_refused_before_the_cloud_model_reads(client, service, monkeypatch):
    monkeypatch.setattr(service.encoder.tokenizer, "chat_template", None)
    known = [entry.name for entry in service.registry.entries]
    messages = [{"role": "system", "content": "never seen before"}, {"role": "user", "content": "what ?"}]
    for model in ("auto", "base"):
        said = client.post("/v1/chat/completions", json={"model": model, "messages": messages})
        assert said.status_code == 400
        assert said.json()["error"]["message"] == "the edge model has no chat template: ask /v1/completions"
    assert [entry.name for entry in service.registry.entries] == known


def test_models_and_specializations_are_listed(client, service):
    ids = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert ids[:2] == ["base", "auto"]
    assert set(PROMPTS) < set(ids)
    assert client.get("/v1/models/two").json()["object"] == "model"
    base = client.get("/v1/models/base").json()
    assert (base["id"], base["root"]) == ("base", "model")  # the edge model's directory, without where it lies
    assert client.get("/v1/models/auto").json()["id"] == "auto"
    for path in ("models/none", "specializations/none", "specializations/base", "specializations/auto"):
        assert client.get(f"/v1/{path}").status_code == 404
    found = client.get("/v1/specializations/red").json()
    assert (found["layers"], found["gates"], found["object"]) == (2, 2, "specialization")
    listed = client.get("/v1/specializations").json()["data"]
    assert {name: value for name, value in found.items() if name not in ("gate_weights", "prompt")} in listed


def test_what_changes_nothing_is_accepted(client):
    plain = complete(client)["choices"]
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1, "echo": False, "suffix": None}
    ignored = {"user": "somebody", "metadata": {"a": "b"}, "store": True, "logit_bias": {}, "stop": None, "n": None}
    more = {"reasoning_effort": "low", "top_k": -1, "stream_options": {"include_usage": None}}
    assert complete(client, **neutral, **ignored, **more)["choices"] == plain


def test_metrics_count_what_happens(client, service):
    def value(name):
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    names = {
        'lora_gen_requests_total{endpoint="/v1/completions",status="200"}': 1,
        "lora_gen_generated_tokens_total": None,
        "lora_gen_read_tokens_total": None,
        "lora_gen_first_token_seconds_count": 1,
        'lora_gen_request_seconds_count{endpoint="/v1/completions"}': 1,
    }
    before = {name: value(name) for name in names}
    used = complete(client)["usage"]
    expected = [1, used["completion_tokens"], used["prompt_tokens"], 1, 1]
    for (name, old), more in zip(before.items(), expected, strict=True):
        # A stop id counts as generated to the scheduler or not; the text's tokens do.
        assert math.isclose(value(name) - old, more), name
    client.get("/v1/models/nobody")
    assert value('lora_gen_requests_total{endpoint="/v1/models/{name}",status="404"}') >= 1
    assert value("lora_gen_rows ") == 4
    assert value("lora_gen_specializations ") == len(service.registry)


@pytest.fixture(scope="module")
def ask(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openais_client_completes_whole_and_streamed(ask, offline, specializer):
    expected = offline("red", QUESTION, 8)
    text = specializer.pair.edge.encoder.decode(expected.ids)
    settings = {"model": "red", "prompt": QUESTION, "max_tokens": 8, "temperature": 0}
    whole = ask.completions.create(**settings, logprobs=1)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, expected.finish)
    assert whole.choices[0].logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert whole.usage.completion_tokens == len(expected.ids)
    chunks = list(ask.completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_a_changed_model_name_is_all_that_a_chat_needs(ask, offline, specializer, service):
    messages = [{"role": "system", "content": PROMPTS["red"]}, {"role": "user", "content": QUESTION}]
    encoder = specializer.pair.edge.encoder
    expected = offline("red", encoder.chat(messages[1:]), 8)
    settings = {"model": "auto", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    whole = ask.chat.completions.create(**settings, logprobs=True)
    assert whole.choices[0].message.content == encoder.decode(expected.ids)
    assert [t.logprob for t in whole.choices[0].logprobs.content] == pytest.approx(expected.logprobs, abs=1e-4)
    assert whole.usage.prompt_tokens == len(encoder.chat(messages[1:]))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = ask.chat.completions.create(**settings, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == encoder.decode(expected.ids)
    assert last.usage.completion_tokens == len(expected.ids)
    # The base reads the same conversation with its system message.
    base = ask.chat.completions.create(**{**settings, "model": "base"})
    assert base.usage.prompt_tokens == len(encoder.chat(messages))
    ask.delete(f"/specializations/{whole.model}", cast_to=object)


def test_an_answers_message_can_be_sent_back(ask, specializer):
    messages: list[Any] = [{"role": "user", "content": "name a cat"}]
    settings: Any = {"model": "cat", "max_tokens": 6, "temperature": 0}
    said = ask.chat.completions.create(messages=messages, **settings).choices[0].message
    other = {**said.model_dump(), "tool_calls": [], "annotations": []}
    for message in (said, said.model_dump(), other):
        turns = [*messages, message, {"role": "user", "content": "a dog"}]
        second = ask.chat.completions.create(messages=turns, **settings)
        plain = [*messages, {"role": "assistant", "content": said.content}, turns[-1]]
        assert second.usage.prompt_tokens == len(specializer.pair.edge.encoder.chat(plain))


def test_openais_client_lists_models(ask):
    assert {"base", *PROMPTS} <= {model.id for model in ask.models.list()}
    assert ask.models.retrieve("two").id == "two"


def test_a_specialization_is_made_asked_and_deleted(ask, offline, specializer):
    made = ask.post("/specializations", body={"name": "mine", "prompt": PROMPTS["cat"]}, cast_to=dict[str, object])
    assert made["id"] == "mine"
    answer = ask.completions.create(model="mine", prompt=QUESTION, max_tokens=8, temperature=0)
    assert answer.choices[0].text == specializer.pair.edge.encoder.decode(offline("cat", QUESTION, 8).ids)
    ask.delete("/specializations/mine", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        ask.models.retrieve("mine")


def test_errors_have_the_clients_own_types(ask, url):
    with pytest.raises(openai.NotFoundError) as missing:
        ask.completions.create(model="nobody", prompt=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_many:
        ask.completions.create(model="red", prompt=QUESTION, max_tokens=1000)
    assert too_many.value.param == "max_tokens"
    tool = {"type": "function", "function": {"name": "a"}}
    with pytest.raises(openai.BadRequestError) as unsupported:
        ask.chat.completions.create(model="red", messages=[{"role": "user", "content": "a"}], tools=[tool])
    assert (unsupported.value.param, unsupported.value.code) == ("tools", "unsupported_value")
    with pytest.raises(openai.ConflictError):
        ask.post("/specializations", body={"name": "red", "prompt": "a"}, cast_to=object)
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
