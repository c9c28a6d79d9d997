"""The playground without a browser: who gets it, what it may do, and what the interface tells it."""

import asyncio
import base64
import hashlib
import re

import httpx
import numpy as np
import tyro
from serving_tools import PROMPTS

from lora_gen_jax.serving import server
from lora_gen_jax.serving.app import page_text
from lora_gen_jax.serving.command import Serve, serve_command


def test_the_page_is_open_and_its_policy_lets_its_own_script_alone_run(url):
    shown = httpx.get(url + "/")  # without the key: the page asks for it
    assert (shown.status_code, shown.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in shown.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", shown.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert httpx.post(url + "/").status_code == 405


def test_the_page_names_no_other_host_and_needs_nothing_that_its_policy_forbids():
    text = page_text()
    assert re.findall(r"[a-z]+://[^'\" ]+", text) == ["http://www.w3.org/2000/svg"]  # a namespace, which is not fetched
    assert re.findall(r"""(?:src|href|action)\s*=\s*["']([^"']{,10})""", text) == ["data:image"]
    for forbidden in ("url(", "@import", "innerHTML", "eval(", ' style="', " onclick="):
        assert forbidden not in text


def test_no_page_leaves_the_page_out(generator_directory, monkeypatch):
    """From the flag to the application that the server runs."""
    apps = []
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: apps.append(self.config.app))
    for given in ([], ["--no-page"]):
        flags = ["--checkpoint", str(generator_directory), "--port", "0", "--rows", "1", "--context", "32"]
        serve_command(tyro.cli(Serve, args=[*flags, "--no-warm-up", *given], config=(tyro.conf.FlagCreatePairsOff,)))

    async def statuses(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [(await client.get(path)).status_code for path in ("/", "/v1/models")]

    assert [asyncio.run(statuses(app)) for app in apps] == [[200, 200], [404, 200]]


def test_one_specialization_is_told_with_its_gates_and_its_prompt(client, service):
    told = client.get("/v1/specializations/red").json()
    assert told["prompt"] == PROMPTS["red"]
    gates = np.asarray(told["gate_weights"])
    assert np.allclose(gates, service.entry("red").gates.dense(), rtol=0, atol=1e-6)  # six decimals are told
    assert (np.count_nonzero(gates, axis=1) == told["gates"]).all()


def test_a_conversations_system_message_is_not_told(client):
    messages = [{"role": "system", "content": "say a secret"}, {"role": "user", "content": "what ?"}]
    asked = {"model": "auto", "messages": messages, "max_tokens": 1}
    name = client.post("/v1/chat/completions", json=asked).json()["model"]
    told = client.get(f"/v1/specializations/{name}").json()
    assert (told["automatic"], told["prompt"]) == (True, None)
    client.delete(f"/v1/specializations/{name}")
