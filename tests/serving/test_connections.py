"""Connections that ask nothing: they end soon, and keep nobody else out."""

import functools
import json
import socket
import time

import httpx
import pytest
from serving_tools import raw_request, serving, wait_until

from lora_gen_jax.serving import guard
from lora_gen_jax.serving.guard import Connection, most_connections
from lora_gen_jax.serving.service import Service

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def connect(specializer, registry_of, puppet):
    """A function: a connection to a server that has four at most."""
    settings = {"http": functools.partial(Connection, waiting={}), "limit_concurrency": 4, "timeout_keep_alive": 75}
    with serving(Service(puppet, specializer, registry_of()), **settings) as url:
        opened = []

        def open_one(sent=b""):
            opened.append(socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=10))
            opened[-1].sendall(sent)
            return opened[-1]

        yield open_one
        for connection in opened:
            connection.close()


def test_connections_that_ask_nothing_make_room(connect):
    idle = [connect() for _ in range(20)]
    kept = connect(HEALTH)
    assert kept.recv(15).startswith(b"HTTP/1.1 200 ")
    answered = [connect(HEALTH).recv(15) for _ in range(20)]  # kept open, they make room, too
    assert set(answered) == {b"HTTP/1.1 200 OK"}
    assert idle[0].recv(1) == b""


def test_a_request_under_way_makes_no_room(connect, puppet):
    body = json.dumps({"model": "red", "prompt": "sun", "max_tokens": 2}).encode()
    asking = connect(raw_request(body))
    wait_until(lambda: len(puppet.works) == 1)
    for _ in range(20):
        assert connect(HEALTH).recv(15) == b"HTTP/1.1 200 OK"
    puppet.say(0, [8], "stop")
    assert asking.recv(15) == b"HTTP/1.1 200 OK"
    assert puppet.cancelled == []


@pytest.mark.parametrize("sent", [b"", b"GET /hea", HEALTH + b"GET /hea"], ids=["nothing", "a part", "a second part"])
def test_a_head_must_come_in_time(connect, monkeypatch, sent):
    monkeypatch.setattr(guard, "_HEAD_SECONDS", 0.3)
    slow = connect(sent)
    began = time.monotonic()
    slow.sendall(b"l") if sent else None
    while slow.recv(65536):
        pass
    assert time.monotonic() - began < 60  # the 75 seconds of `timeout_keep_alive` are no reason


def test_a_kept_connection_has_time_for_its_next_request(connect, monkeypatch):
    monkeypatch.setattr(guard, "_HEAD_SECONDS", 0.2)
    kept = connect(HEALTH)
    for seconds in (0.5, 0):
        answer = b""
        while not answer.endswith(b"}"):  # head and body may come one after the other
            answer += kept.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        time.sleep(seconds)
        kept.sendall(HEALTH)


def test_no_more_connections_than_the_system_has_files_for(monkeypatch):
    import resource

    limits = {"now": (256, 400)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: limits.update(now=both))
    assert most_connections() == 400 - 256
    assert limits["now"] == (400, 400)
    limits["now"] = (256, 5000)
    assert most_connections() == 1024
    assert limits["now"] == (1280, 5000)
