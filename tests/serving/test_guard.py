"""What other sites' pages can have a browser send is refused, and an address that others reach has a key."""

import socket

import httpx
import openai
import pytest
from helpers import raises
from serving_tools import KEY, raw_request, say_at_once, serving

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.serving import command
from lora_gen_jax.serving.command import Serve, serve_command
from lora_gen_jax.serving.guard import Hosts
from lora_gen_jax.serving.server import bind
from lora_gen_jax.serving.service import Service

ASK = {"model": "red", "prompt": "sun", "max_tokens": 2}


@pytest.fixture
def open_service(specializer, registry_of, puppet):
    """A service without a key."""
    return Service(say_at_once(puppet), specializer, registry_of())


@pytest.fixture
def open_url(open_service):
    with serving(open_service) as url:
        yield url


def error_of(answer):
    return answer.status_code, answer.json()["error"]["param"], answer.json()["error"]["code"]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1", ""])
def test_pages_of_other_sites_are_refused(open_url, puppet, origin):
    for method, path in (("POST", "/v1/completions"), ("POST", "/v1/specializations"), ("GET", "/v1/models")):
        answer = httpx.request(method, open_url + path, json=ASK, headers={"Origin": origin})
        assert error_of(answer) == (403, "Origin", "foreign_origin")
        assert "access-control-allow-origin" not in answer.headers
    answer = httpx.delete(f"{open_url}/v1/specializations/red", headers={"Origin": origin})
    assert error_of(answer) == (403, "Origin", "foreign_origin")
    assert httpx.get(f"{open_url}/v1/specializations/red").status_code == 200
    assert puppet.works == []


def test_a_page_under_the_servers_own_name_may_ask(open_url):
    port = httpx.URL(open_url).port
    for name in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        headers = {"Host": name, "Origin": f"http://{name}"}
        assert httpx.post(open_url + "/v1/completions", json=ASK, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "192.0.2.7", "localhost@evil", "", "[::2]"]
)
def test_other_hosts_are_refused(open_url, puppet, host):
    for path in ("/v1/models", "/health", "/metrics"):
        answer = httpx.get(open_url + path, headers={"Host": host})
        assert error_of(answer) == (403, "Host", "foreign_host")
    answer = httpx.post(open_url + "/v1/completions", json=ASK, headers={"Host": host, "Origin": f"http://{host}"})
    assert error_of(answer) == (403, "Host", "foreign_host")
    assert puppet.works == []


@pytest.mark.parametrize(
    "media",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "text/json", None],
)
def test_bodies_must_say_that_they_are_json(open_url, puppet, media):
    headers = {} if media is None else {"Content-Type": media}
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/specializations"):
        answer = httpx.post(open_url + path, content=b'{"model": "red", "prompt": "sun"}', headers=headers)
        assert error_of(answer) == (415, "Content-Type", "unsupported_media_type")
    assert puppet.works == []


def test_openais_client_needs_no_key_on_the_same_machine(open_url):
    with openai.OpenAI(base_url=f"{open_url}/v1", api_key="any", max_retries=0) as client:
        assert client.completions.create(**ASK).choices[0].finish_reason == "stop"
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = b'{"model": "red", "prompt": "sun"}'
    assert httpx.post(open_url + "/v1/completions", content=body, headers=headers).status_code == 200


def answer_to(url, request):
    """What a server says to bytes before it closes the connection."""
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=10) as connection:
        connection.sendall(request)
        said = b""
        while part := connection.recv(65536):
            said += part
        return said


def test_a_body_of_two_lengths_is_refused(open_url, puppet):
    smuggled = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    request = raw_request(smuggled).replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nContent-Length")
    said = answer_to(open_url, request)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert said.count(b"HTTP/1.1 ") == 1
    assert puppet.works == []


@pytest.mark.parametrize(("digits", "status"), [(19, b"413"), (20, b"413"), (21, b"400")])
@pytest.mark.timeout(20)
def test_a_length_of_many_digits_is_an_error_at_once(open_url, digits, status):
    said = answer_to(open_url, raw_request(b"{", "9" * digits))
    assert said.startswith(b"HTTP/1.1 " + status)


def test_a_request_of_http_1_0_needs_no_host(open_url):
    assert answer_to(open_url, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_names_that_a_server_answers_to():
    with bind("127.0.0.1", 0) as listener:
        here = Hosts.of(listener, ["Models.example", "*.inside.example"])
        for bad in ("http://a", "a:80", "", "a b", "*a"):
            with raises(ConfigError, "--allowed-hosts", repr(bad)):
                Hosts.of(listener, [bad])
    assert all(map(here.include, ("models.example:80", "a.b.inside.example", "localhost.", "127.9.9.9", "[::1]:8000")))
    assert not any(map(here.include, ("inside.example", "xinside.example", "10.0.0.1", socket.gethostname() + "x")))
    with bind("0.0.0.0", 0) as listener:
        everywhere = Hosts.of(listener)
        assert all(map(everywhere.include, ("10.0.0.1:80", "[fe80::1]", socket.gethostname(), "localhost")))
        assert not everywhere.include("evil.example")
        assert Hosts.of(listener, ["*"]).include("evil.example")


def test_an_address_that_others_reach_needs_a_key(monkeypatch):
    monkeypatch.delenv("LORA_GEN_API_KEY", raising=False)

    class Loading(Exception):
        """The flags were good."""

    def load(flags):
        raise Loading

    monkeypatch.setattr(command, "_specializer", load)
    with raises(ConfigError, "--api-key", "0.0.0.0", "--without-key", code="missing"):
        serve_command(Serve(host="0.0.0.0", port=0))
    for flags in ({"api_key": KEY}, {"without_key": True}):
        with pytest.raises(Loading):
            serve_command(Serve(host="0.0.0.0", port=0, **flags))
    with pytest.raises(Loading):
        serve_command(Serve(host="localhost", port=0))
