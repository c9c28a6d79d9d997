"""Specializations while a server runs: made once, named, bounded, kept on disk, and found again."""

import asyncio
import json
import threading
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from helpers import raises
from serving_tools import PROMPTS, Puppet, say_at_once

from lora_gen_jax.adapters.specialization import load_specialization
from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.errors import OutputError
from lora_gen_jax.serving.app import make_app
from lora_gen_jax.serving.errors import ApiError
from lora_gen_jax.serving.registry import Entry, Registry, Served
from lora_gen_jax.serving.service import Limits, Service
from lora_gen_jax.serving.stored import read_entries, remove_directory


class Counting:
    """The generator, noting what it reads and how many prompts at a time."""

    def __init__(self, specializer):
        self.inner, self.read, self.now, self.most = specializer, [], 0, 0
        self.go = threading.Event()
        self.go.set()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def specialize(self, prompts, refine=None):
        self.now += 1
        self.most = max(self.most, self.now)
        self.read += prompts
        assert self.go.wait(20)
        try:
            return self.inner.specialize(prompts, refine=refine)
        finally:
            self.now -= 1


@pytest.fixture
def counting(specializer):
    return Counting(specializer)


def talk(service, conversation):
    """Runs a coroutine function with a client of the application."""

    async def run():
        transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await conversation(client)

    try:
        return asyncio.run(run())
    finally:
        service.close()


def make(client, **fields):
    return client.post("/v1/specializations", json=fields)


def messages(system, user="name a cat"):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def test_a_prompt_a_conversation_and_shots_become_specializations(counting, made):
    service = Service(Puppet(), counting, Registry(10))
    shots = [{"input": "what is the sun ?", "output": "red"}]
    turns = [*messages("say red", "what is the sun ?"), {"role": "assistant", "content": "red"}]

    async def conversation(client):
        first = await make(client, name="first", prompt=PROMPTS["red"])
        assert (first.status_code, first.json()["id"]) == (200, "first")
        assert first.json()["prompt_tokens"] == len(counting.ids(PROMPTS["red"]))
        assert (await make(client, description="say red", shots=shots)).status_code == 200
        assert (await make(client, name="chat", messages=turns)).status_code == 200
        assert counting.read[1] == counting.read[2] != PROMPTS["red"]
        assert len((await client.get("/v1/specializations")).json()["data"]) == 3

    talk(service, conversation)
    # Together with other prompts or alone: the same but for the rounding of float32, and no other prompt's.
    far = min(
        np.max(np.abs(made[name].gates(4).dense() - made["red"].gates(4).dense())) for name in made if name != "red"
    )
    assert np.max(np.abs(service.entry("first").gates.dense() - made["red"].gates(4).dense())) < 0.01 * far
    assert counting.most == 1


def test_bad_prompts_and_names_are_errors(counting):
    service = Service(Puppet(), counting, Registry(10))
    cases = [
        ({}, "prompt", None, "none"),
        ({"prompt": "a", "shots": [{"input": "a", "output": "b"}]}, "prompt", None, '"prompt" and "shots"'),
        ({"prompt": " "}, "prompt", None, "prompt"),
        ({"prompt": "cat " * 400}, None, None, "tokens"),
        ({"prompt": 3}, "prompt", "invalid_value", "string"),
        ({"messages": messages("say red")}, "messages.1", None, "message 2"),
        ({"shots": [3]}, "shots.0", None, "shot 1"),
        ({"shots": "a"}, "shots", "invalid_value", "list"),
        ({"shots": [{"input": "a"}]}, "shots.0.output", None, '"output"'),
        *(
            ({"prompt": "a", "name": name}, "name", "invalid_name", "1 to 64")
            for name in ("../up", "a/b", ".hidden", "", "x" * 65)
        ),
        *(
            ({"prompt": "a", "name": name}, "name", "invalid_name", repr(name))
            for name in ("base", "Auto", "auto-0123")
        ),
        ({"prompt": "a", "model": "x"}, "model", "unknown_field", "model"),
    ]

    async def conversation(client):
        for fields, param, code, fact in cases:
            answer = await make(client, **fields)
            assert answer.status_code == 400, fields
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == (param, code), fields
            assert fact in error["message"], fields
            assert "--" not in error["message"]  # a flag, which a client does not have
        assert (await client.get("/v1/specializations")).json()["data"] == []
        # Nothing of what failed holds a name.
        assert (await make(client, name="x", prompt="cat " * 400)).status_code == 400
        assert (await make(client, name="x", prompt="cat")).status_code == 200
        taken = await make(client, name="X", prompt="dog")
        assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")

    talk(service, conversation)


def test_too_many_are_refused_and_automatic_ones_go_first(counting):
    service = Service(say_at_once(Puppet()), counting, Registry(3))

    async def chat(client, system):
        return await client.post("/v1/chat/completions", json={"model": "auto", "messages": messages(system)})

    async def conversation(client):
        first, second = [(await chat(client, text)).json()["model"] for text in ("say red", "say green")]
        assert first.startswith("auto-")
        assert (await make(client, name="one", prompt="say blue")).status_code == 200
        assert (await chat(client, "say red")).json()["model"] == first  # used again: the other one is older now
        assert (await make(client, name="two", prompt="say cat")).status_code == 200
        assert (await client.get(f"/v1/models/{second}")).status_code == 404
        assert (await client.get(f"/v1/models/{first}")).status_code == 200
        assert (await make(client, name="three", prompt="say cat")).status_code == 200
        refused = await make(client, name="four", prompt="say dog")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_specializations")
        assert (await chat(client, "say fish")).status_code == 429
        assert (await client.delete("/v1/specializations/two")).json()["deleted"] is True
        assert (await client.delete("/v1/specializations/two")).status_code == 404
        assert (await make(client, name="four", prompt="say dog")).status_code == 200

    talk(service, conversation)
    assert [entry.name for entry in service.registry.entries] == ["four", "one", "three"]


def test_requests_with_the_same_system_message_specialize_once(counting):
    puppet = say_at_once(Puppet())
    service = Service(puppet, counting, Registry(10))

    async def conversation(client):
        counting.go.clear()
        ask = [
            client.post("/v1/chat/completions", json={"model": "auto", "messages": messages("say red", user)})
            for user in ("sun", "moon", "star")
        ]
        waiting = [asyncio.ensure_future(request) for request in ask]
        while not counting.read:
            await asyncio.sleep(0.001)
        # The event loop is free while the cloud model reads.
        assert (await client.get("/health")).status_code == 200
        counting.go.set()
        return await asyncio.gather(*waiting)

    answers = talk(service, conversation)
    assert counting.read == ["say red"]
    assert len({answer.json()["model"] for answer in answers}) == 1
    entry = service.entry(answers[0].json()["model"])
    assert all(work.gates is entry.gates for work in puppet.works)
    # The edge model reads the other messages alone.
    chat = service.encoder.chat
    assert [list(work.ids) for work in puppet.works] == [
        chat([{"role": "user", "content": user}]) for user in ("sun", "moon", "star")
    ]


def test_a_specialization_that_takes_too_long_is_given_up_and_kept(counting):
    service = Service(Puppet(), counting, Registry(10), Limits(timeout=0.5))

    async def conversation(client):
        counting.go.clear()
        late = await make(client, name="late", prompt="say red")
        assert late.status_code == 504
        counting.go.set()
        while service.registry.get("late") is None:
            await asyncio.sleep(0.001)

    talk(service, conversation)


def test_the_store_keeps_what_clients_make(counting, specializer, made, tmp_path):
    store = tmp_path / "store"
    registry = Registry(10, store)
    registry.add(Served.of(specializer).entry("given", made["two"]))
    service = Service(say_at_once(Puppet()), counting, registry)

    async def conversation(client):
        assert (await make(client, name="kept", prompt=PROMPTS["red"])).status_code == 200
        assert (await make(client, name="gone", prompt=PROMPTS["two"])).status_code == 200
        await client.post("/v1/chat/completions", json={"model": "auto", "messages": messages("say red")})
        assert sorted(path.name for path in store.iterdir()) == ["gone", "kept"]
        assert (await client.delete("/v1/specializations/gone")).status_code == 200
        assert (await client.delete("/v1/specializations/given")).status_code == 200

    talk(service, conversation)
    assert [path.name for path in store.iterdir()] == ["kept"]
    (entry,) = read_entries([store], Served.of(specializer))
    assert (entry.name, entry.prompt_tokens) == ("kept", len(counting.ids(PROMPTS["red"])))
    assert (entry.gates.dense() == service.entry("kept").gates.dense()).all()


def test_a_store_that_cannot_be_written_fails_the_request_alone(counting, tmp_path):
    (tmp_path / "store").write_text("a file")
    service = Service(Puppet(), counting, Registry(10, tmp_path / "store"))

    async def conversation(client):
        failed = await make(client, name="x", prompt="say red")
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert str(tmp_path) not in failed.text
        assert "--out" not in failed.text
        assert (await client.get("/v1/specializations")).json()["data"] == []

    talk(service, conversation)


def test_a_name_is_taken_until_its_removal_is_done(counting, tmp_path, monkeypatch):
    registry, removing, go = Registry(10, tmp_path / "store"), threading.Event(), threading.Event()
    service = Service(Puppet(), counting, registry)

    def slowly(directory):
        removing.set()
        assert go.wait(20)
        remove_directory(directory)

    monkeypatch.setattr("lora_gen_jax.serving.service.remove_directory", slowly)

    async def conversation(client):
        assert (await make(client, name="a", prompt="say red")).status_code == 200
        removal = asyncio.ensure_future(client.delete("/v1/specializations/a"))
        assert await asyncio.to_thread(removing.wait, 20)
        assert (await make(client, name="a", prompt="say blue")).status_code == 409
        assert (await client.delete("/v1/specializations/a")).status_code == 404
        go.set()
        assert (await removal).status_code == 200
        assert (await make(client, name="a", prompt="say blue")).status_code == 200

    talk(service, conversation)
    assert load_specialization(tmp_path / "store" / "a").prompt == "say blue"


def test_what_cannot_be_removed_is_kept(counting, tmp_path, monkeypatch):
    service = Service(Puppet(), counting, Registry(10, tmp_path / "store"))

    def failing(directory):
        raise OutputError(f"{directory} cannot be removed")

    monkeypatch.setattr("lora_gen_jax.serving.service.remove_directory", failing)

    async def conversation(client):
        assert (await make(client, name="a", prompt="say red")).status_code == 200
        failed = await client.delete("/v1/specializations/a")
        assert failed.status_code == 500
        assert str(tmp_path) not in failed.text
        assert (await client.get("/v1/specializations/a")).status_code == 200

    talk(service, conversation)


def test_long_texts_do_not_hold_the_event_loop_up(counting, monkeypatch):
    service, threads = Service(Puppet(), counting, Registry(10)), []

    def note(text):
        threads.append(threading.current_thread() is threading.main_thread())
        return [8]

    monkeypatch.setattr(service, "encoder", SimpleNamespace(text=note, vocab_size=64, exceeds=lambda *sizes: False))
    for prompts in (["cat"] * 3, ["cat " * 1000] * 5):
        assert asyncio.run(service.prompt_ids(prompts)) == [[8]] * len(prompts)
    service.close()
    assert threads == [True] * 3 + [False] * 5


def test_a_reserved_name_counts(made, specializer):
    registry = Registry(2)
    registry.reserve("a")
    with raises(ApiError, "name", "'A'", code="name_taken"):
        registry.reserve("A")
    registry.reserve("b")
    with raises(ApiError, None, 2, code="too_many_specializations"):
        registry.reserve("c")
    registry.release("b")
    registry.reserve("c")
    entry: Entry = Served.of(specializer).entry("c", made["red"])
    registry.add(entry)
    assert registry.get("c") is entry
    assert registry.get("C") is registry.get("a") is None
    assert json.dumps(entry.body)


def test_a_text_of_many_characters_is_refused_unread(specializer, monkeypatch):
    service, long = Service(Puppet(), specializer, Registry(10)), "cat " * 10_000
    monkeypatch.setattr(Encoder, "text", lambda self, text: pytest.fail("it was made into tokens"))
    monkeypatch.setattr(Encoder, "chat", lambda self, turns: pytest.fail("it was made into tokens"))
    for ask in (service.prompt_ids([long]), service.chat_ids([{"role": "user", "content": long}])):
        with raises(ApiError, None, 40_000, 96, code="context_length_exceeded"):
            asyncio.run(ask)

    async def conversation(client):
        answer = await make(client, name="a", prompt=long)
        assert (answer.status_code, service.registry.get("a")) == (400, None)

    talk(service, conversation)
    service.close()
