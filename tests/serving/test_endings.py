"""How a request ends early: a full queue, the time limit, a client that leaves, a scheduler that fails or closes."""

import asyncio
import json
import os
import signal
import socket
import threading
import time

import httpx
import pytest
from helpers import raises
from serving_tools import Puppet, raw_request, say_at_once, serving, wait_until

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.serving import guard, server, web
from lora_gen_jax.serving.app import make_app
from lora_gen_jax.serving.scheduler import Closing, Failed, QueueFull
from lora_gen_jax.serving.server import bind, run_server
from lora_gen_jax.serving.service import Limits, Service

ASK = {"model": "red", "prompt": ["sun", "moon", "star"], "max_tokens": 5}


@pytest.fixture
def build(specializer, registry_of):
    """A function: a service of a puppet."""
    return lambda puppet, **limits: Service(puppet, specializer, registry_of(), Limits(**limits))


def post(service, fields, path="/v1/completions"):
    async def run():
        transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, json=fields)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("refusal", "status", "code", "retry"),
    [
        (QueueFull("7 wait"), 429, "queue_full", "1"),
        (Closing("closing"), 503, "closing", "1"),
        (Failed("failed"), 503, "failed", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_scheduler_refuses_is_an_error(build, puppet, refusal, status, code, retry, stream):
    puppet.refusal = refusal
    service = build(puppet)
    answer = post(service, {**ASK, "stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers.get("retry-after") == retry
    assert puppet.works == puppet.cancelled == []
    assert b"lora_gen_cancelled_total 0.0" in service.metrics.text()


def test_a_request_that_the_queue_can_never_hold_is_an_error_of_the_client(build, puppet):
    service = build(puppet, sequences=2)
    assert post(service, ASK).status_code == 400
    chat = {"model": "red", "messages": [{"role": "user", "content": "sun"}], "n": 3}
    answer = post(service, chat, "/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


def test_the_default_length_is_at_most_what_is_allowed(build, puppet):
    say_at_once(puppet)
    for limits, expected in (({}, 16), ({"max_new_tokens": 5}, 5)):
        assert post(build(puppet, **limits), {"model": "red", "prompt": "sun", "top_k": -1}).status_code == 200
        assert (puppet.works[-1].settings.max_new_tokens, puppet.works[-1].settings.sampling.top_k) == (expected, 0)
    assert post(build(puppet), {"model": "red", "prompt": [8] * 90}).status_code == 200
    assert puppet.works[-1].settings.max_new_tokens == puppet.longest - 90


def test_an_answer_that_takes_too_long_is_given_up(build, puppet):
    service = build(puppet, timeout=0.1)
    answer = post(service, ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert puppet.cancelled == [0, 1, 2]
    assert b"lora_gen_cancelled_total 3.0" in service.metrics.text()


def test_a_stream_that_takes_too_long_ends_with_an_error(build, puppet):
    answer = post(build(puppet, timeout=0.1), {**ASK, "stream": True})
    assert answer.status_code == 200
    error = json.loads(answer.text.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("timeout", "server_error")
    assert puppet.cancelled == [0, 1, 2]


@pytest.mark.parametrize(("finish", "status"), [("failed", 500), ("cancelled", 503)])
def test_a_sequence_that_the_scheduler_gives_up_is_an_error(build, puppet, finish, status):
    submit = puppet.submit

    def failing(work, listener):
        ticket = submit(work, listener)
        if len(puppet.works) == 2:
            puppet.say(0, [9], "stop")
            puppet.say(1, [8], finish)
        return ticket

    puppet.submit = failing
    answer = post(build(puppet), ASK)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "server_error")
    assert puppet.cancelled == [2]


def test_an_unexpected_error_is_json_without_its_details(build, puppet):
    puppet.submit = None
    answer = post(build(puppet), ASK)
    assert answer.status_code == 500
    assert "NoneType" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


def test_a_stop_string_cancels_the_row(build, puppet, specializer):
    encoder = specializer.pair.edge.encoder
    submit = puppet.submit

    def answering(work, listener):
        ticket = submit(work, listener)
        puppet.say(0, encoder.text("red green"))
        puppet.say(0, encoder.text("blue sun"))
        return ticket

    puppet.submit = answering
    answer = post(build(puppet), {"model": "red", "prompt": "sun", "stop": "blue"})
    assert answer.json()["choices"][0] == {
        "index": 0,
        "text": "red green ",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert puppet.cancelled == [0]
    # The stop string's own token counts: it was generated.
    assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(build, puppet, stream):
    service = build(puppet)
    body = json.dumps({**ASK, "stream": stream}).encode()
    with serving(service) as url:
        port = httpx.URL(url).port
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(raw_request(body))
            wait_until(lambda: len(puppet.works) == 3)
            puppet.say(0, [8, 9])
            if stream:
                assert connection.recv(9) == b"HTTP/1.1 "
            assert puppet.cancelled == []
        wait_until(lambda: puppet.cancelled == [0, 1, 2])
        wait_until(lambda: b'status="499"} 1.0' in service.metrics.text())


def test_a_client_that_leaves_before_the_end_of_its_body_asks_nothing(build, puppet):
    service = build(puppet)
    with serving(service) as url:
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as connection:
            connection.sendall(raw_request(b"{", 100))
        wait_until(lambda: b'status="499"} 1.0' in service.metrics.text())
    assert puppet.works == []


def test_the_event_loop_is_free_while_others_wait(build, puppet):
    with serving(build(puppet)) as url, socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as connection:
        body = json.dumps(ASK).encode()
        connection.sendall(raw_request(body))
        wait_until(lambda: len(puppet.works) == 3)
        assert httpx.get(url + "/health").status_code == 200


def end_after(service, listener, seconds, conversation):
    """The exit status of a server that a conversation in another thread ends."""
    thread = threading.Thread(target=conversation)
    before = signal.getsignal(signal.SIGTERM)
    status = run_server(service, listener, seconds, thread.start)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    return status


def test_a_short_time_to_end_is_enough_where_nothing_is_asked(build, puppet):
    puppet.close = lambda timeout: True
    listener = bind("127.0.0.1", 0)
    assert end_after(build(puppet), listener, 0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0


def test_too_many_requests_at_a_time_are_refused(build, puppet, monkeypatch):
    monkeypatch.setattr(guard, "MOST_CONNECTIONS", 2)
    puppet.close = lambda timeout: True
    listener, statuses = bind("127.0.0.1", 0), []

    def talk():
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/health"
        statuses.append(httpx.get(url).status_code)
        with socket.create_connection(listener.getsockname()) as asking:
            asking.sendall(raw_request(json.dumps(ASK).encode()))
            wait_until(lambda: len(puppet.works) == 3)
            statuses.append(httpx.get(url).status_code)
        os.kill(os.getpid(), signal.SIGTERM)

    assert end_after(build(puppet), listener, 2.0, talk) == 0
    assert statuses == [200, 503]


@pytest.mark.parametrize("leaves_unread", ["an answer", "a stream"])
def test_a_client_that_does_not_read_holds_nothing_up(build, puppet, monkeypatch, leaves_unread):
    monkeypatch.setattr(server, "_UNREAD_SECONDS", 0.2)
    monkeypatch.setattr(web, "_READING_SECONDS", 0.0)
    puppet.close = lambda timeout: True
    stream = leaves_unread == "a stream"
    service = build(puppet, timeout=1.0 if stream else 60.0)
    listener = bind("127.0.0.1", 0)
    # Small: what a test says is more than both sides' systems keep.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ends = []
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def talk():
        client.connect(listener.getsockname())
        body = json.dumps({**ASK, "prompt": "sun", "stream": stream}).encode()
        client.sendall(raw_request(body))
        wait_until(lambda: len(puppet.works) == 1)
        puppet.say(0, [8] * 40_000, "stop")
        if stream:  # it is cut off while the server runs
            wait_until(lambda: b'status="504"} 1.0' in service.metrics.text())
        else:
            wait_until(lambda: b'status="200"} 1.0' in service.metrics.text())
        ends.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    with client:
        assert end_after(service, listener, 30.0, talk) == 0
        assert time.monotonic() - ends[0] < 5


@pytest.mark.parametrize("answered", [True, False])
def test_a_signal_waits_for_answers_but_not_for_ever(build, puppet, answered):
    service, statuses = build(puppet), []
    puppet.close = lambda timeout: True
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def ask():
        try:
            statuses.append(httpx.post(url + "/v1/completions", json=ASK, timeout=20).status_code)
        except httpx.HTTPError as error:
            statuses.append(type(error))

    def end():
        wait_until(lambda: len(puppet.works) == 3)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: service.closing)
        for index in range(3 if answered else 2):
            puppet.say(index, [8], "stop")

    def talk():
        asking = threading.Thread(target=ask)
        asking.start()
        end()
        asking.join()

    # Cut off, it is an error however the seconds are rounded.
    status = end_after(service, listener, 1.0 if answered else 0.4, talk)
    assert status == (0 if answered else 1)
    assert puppet.cancelled == ([] if answered else [2])
    # Cut off after the time to end: no answer, or an error of the server.
    assert (statuses == [200]) is answered


def test_an_address_that_is_taken_is_an_error():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with raises(ConfigError, "--port", f"--port {port}"):
            bind("127.0.0.1", port)
    with raises(ConfigError, "--host", "no such host"):
        bind("no such host", 80)


def test_health_tells_an_end_and_a_failure(build):
    async def health(service):
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/health")

    closing, failed = build(Puppet()), build(Puppet())
    assert asyncio.run(health(closing)).status_code == 200
    closing.closing, failed.scheduler.alive = True, False
    answer = asyncio.run(health(closing))
    assert (answer.status_code, answer.json()) == (503, {"status": "closing"})
    assert answer.headers["connection"] == "close"
    assert asyncio.run(health(failed)).json() == {"status": "failed"}
