"""Specialisations while a server runs: made once, named, bounded, kept on disk, and found again."""

import asyncio
import dataclasses
import json
import threading

import httpx
import numpy as np
import pytest
from serving_tools import PROMPTS, Puppet

from lora_gen_jax.adapters.specialization import load_specialization, save_specialization
from lora_gen_jax.errors import CheckpointError
from lora_gen_jax.serving.app import make_app
from lora_gen_jax.serving.errors import ApiError
from lora_gen_jax.serving.registry import Entry, Registry, Served, read_entries
from lora_gen_jax.serving.service import Limits, Service


class Counting:
    """The generator, noting what it reads and how many prompts at a time."""

    def __init__(self, specializer):
        self.inner, self.read, self.now, self.most = specializer, [], 0, 0
        self.go = threading.Event()
        self.go.set()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def specialize(self, prompts):
        self.now += 1
        self.most = max(self.most, self.now)
        self.read += prompts
        assert self.go.wait(20)
        try:
            return self.inner.specialize(prompts)
        finally:
            self.now -= 1


@pytest.fixture
def counting(specializer):
    return Counting(specializer)


def talk(service, conversation):
    """Runs a coroutine function with a client of the application."""

    async def run():
        transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await conversation(client)

    try:
        return asyncio.run(run())
    finally:
        service.close()


def make(client, **fields):
    return client.post("/v1/specializations", json=fields)


def messages(system, user="name a cat"):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def say_at_once(puppet, ids=(8, 9)):
    """Every work ends with these ids as soon as it is submitted."""
    submit = puppet.submit

    def answering(work, listener):
        ticket = submit(work, listener)
        puppet.say(len(puppet.works) - 1, list(ids), "stop")
        return ticket

    puppet.submit = answering
    return puppet


def test_a_prompt_a_conversation_and_shots_become_specialisations(counting, made):
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
    # Together with other prompts or alone: the same but for rounding.
    np.testing.assert_allclose(service.entry("first").gates_LE, made["red"].gates(4), atol=1e-6)
    assert counting.most == 1


def test_bad_prompts_and_names_are_errors(counting):
    service = Service(Puppet(), counting, Registry(10))
    cases = [
        ({}, 400, "exactly one"),
        ({"prompt": "a", "shots": [{"input": "a", "output": "b"}]}, 400, "exactly one"),
        ({"prompt": " "}, 400, "prompt"),
        ({"prompt": "cat " * 400}, 400, "tokens, the limit is"),
        ({"prompt": 3}, 400, "string"),
        ({"messages": messages("say red")}, 400, "without an answer"),
        ({"shots": [{"input": "a"}]}, 400, "output"),
        ({"prompt": "a", "name": "../up"}, 400, "letters"),
        ({"prompt": "a", "name": "a/b"}, 400, "letters"),
        ({"prompt": "a", "name": ".hidden"}, 400, "letters"),
        ({"prompt": "a", "name": ""}, 400, "letters"),
        ({"prompt": "a", "name": "x" * 65}, 400, "letters"),
        ({"prompt": "a", "name": "base"}, 400, "reserved"),
        ({"prompt": "a", "name": "Auto"}, 400, "reserved"),
        ({"prompt": "a", "name": "auto-0123"}, 400, "reserved"),
        ({"prompt": "a", "model": "x"}, 400, "unknown field"),
    ]

    async def conversation(client):
        for fields, status, words in cases:
            answer = await make(client, **fields)
            assert answer.status_code == status, fields
            assert words in answer.json()["error"]["message"], fields
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


def test_requests_with_the_same_system_message_specialise_once(counting):
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
    assert all(work.gates_LE is entry.gates_LE for work in puppet.works)
    # The edge model reads the other messages alone.
    chat = service.encoder.chat
    assert [list(work.ids) for work in puppet.works] == [
        chat([{"role": "user", "content": user}]) for user in ("sun", "moon", "star")
    ]


def test_a_specialisation_that_takes_too_long_is_given_up_and_kept(counting):
    service = Service(Puppet(), counting, Registry(10), Limits(timeout=0.05))

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
    assert (entry.gates_LE == service.entry("kept").gates_LE).all()


def test_a_store_that_cannot_be_written_fails_the_request_alone(counting, tmp_path):
    (tmp_path / "store").write_text("a file")
    service = Service(Puppet(), counting, Registry(10, tmp_path / "store"))

    async def conversation(client):
        failed = await make(client, name="x", prompt="say red")
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert (await client.get("/v1/specializations")).json()["data"] == []

    talk(service, conversation)


def test_directories_of_specialisations_are_read(specializer, made, tmp_path):
    served = Served.of(specializer)
    for name, specialization in made.items():
        save_specialization(specialization, tmp_path / "many" / name)
    (tmp_path / "many" / ".cat.half-written").mkdir()
    save_specialization(made["red"], tmp_path / "single")
    entries = read_entries([tmp_path / "single", tmp_path / "many"], served)
    assert sorted(entry.name for entry in entries) == ["cat", "red", "single", "two"]
    assert {len(entry.gates_LE) for entry in entries} == {2}
    with pytest.raises(CheckpointError, match="would have the same name"):
        read_entries([tmp_path / "many", tmp_path / "many" / "red"], served)


def test_a_directory_that_cannot_be_served_is_named(specializer, made, tmp_path):
    served, good = Served.of(specializer), made["red"]
    for part, words in (("pool", "made with another expert pool"), ("edge", "made for another edge model")):
        other = dataclasses.replace(good, fingerprints={**good.fingerprints, part: "0" * 16})
        save_specialization(other, tmp_path / part)
        with pytest.raises(CheckpointError, match=f"{part} cannot be served: .*{words}"):
            read_entries([tmp_path / part], served)
    save_specialization(good, tmp_path / "auto")
    with pytest.raises(CheckpointError, match=r"auto cannot be served: .*reserved"):
        read_entries([tmp_path / "auto"], served)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").mkdir()
    for path, words in (("empty", "holds no"), ("missing", "no directory"), ("notes", "text cannot be served")):
        with pytest.raises(CheckpointError, match=words):
            read_entries([tmp_path / path], served)
    with pytest.raises(CheckpointError, match="of 2 layers, the generator's edge model has 3"):
        dataclasses.replace(served, fit=dataclasses.replace(served.fit, layers=3)).entry("x", good)


def test_a_small_change_of_a_stored_file_is_noticed(specializer, made, tmp_path):
    save_specialization(made["red"], tmp_path / "red")
    assert load_specialization(tmp_path / "red").prompt == PROMPTS["red"]
    (tmp_path / "red" / "prompt.txt").write_text("say blue")
    with pytest.raises(CheckpointError, match="red cannot be served"):
        read_entries([tmp_path / "red"], Served.of(specializer))


def test_a_reserved_name_counts(made, specializer):
    registry = Registry(2)
    registry.reserve("a")
    with pytest.raises(ApiError, match="already"):
        registry.reserve("A")
    registry.reserve("b")
    with pytest.raises(ApiError, match="the limit"):
        registry.reserve("c")
    registry.release("b")
    registry.reserve("c")
    entry: Entry = Served.of(specializer).entry("c", made["red"])
    registry.add(entry)
    assert registry.get("c") is entry
    assert registry.get("C") is registry.get("a") is None
    assert json.dumps(entry.body)
