"""The command itself, on the shipped pair: from its first line to an end that loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

PROMPT = "Tell me what a baby of this animal is called and put it in square brackets."
KEY = "a-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(process, address) of a server that a test ends."""
    store = tmp_path_factory.mktemp("store")
    flags = ["--checkpoint", "quickstart", "--port", "0", "--store", str(store), "--rows", "4"]
    flags += ["--shutdown-timeout", "60", "--no-warm-up"]
    environment = {**os.environ, "LORA_GEN_API_KEY": KEY, "XLA_FLAGS": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_gen_jax", "serve", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"serving (http://127\.0\.0\.1:\d+)  \(edge pocket-edge, 0 specializations\)", line)
    try:
        assert found, line + (process.communicate(timeout=5)[1] if process.poll() is not None else "")
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def test_it_answers_and_ends_without_losing_an_answer(server):
    process, url = server
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        made = client.post("/v1/specializations", json={"name": "young", "prompt": PROMPT}).json()
        assert made["id"] == "young"
        ask = {"model": "young", "prompt": ["owl:", "cow:"], "temperature": 0}
        texts = [choice["text"] for choice in client.post("/v1/completions", json=ask).json()["choices"]]
        assert texts == [" [owlet]", " [calf]"]
        assert httpx.get(url + "/v1/models").status_code == 401

    count, n = 5, 6
    began = threading.Barrier(count + 1, timeout=60)

    def stream(seed):
        """Finish reasons of a long request, whose stream begins before the signal comes."""
        ask = {"model": "base", "prompt": "owl", "max_tokens": 48, "n": n, "seed": seed, "stream": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        finished, last = {}, ""
        with httpx.stream("POST", url + "/v1/completions", json=ask, headers=headers, timeout=60) as answer:
            assert answer.status_code == 200
            began.wait()
            for line in answer.iter_lines():
                if line:
                    last = line.removeprefix("data: ")
                if line and last != "[DONE]":
                    (choice,) = json.loads(last)["choices"]
                    finished[choice["index"]] = choice["finish_reason"]
        assert last == "[DONE]"
        return finished

    with ThreadPoolExecutor(count) as threads:
        streams = [threads.submit(stream, seed) for seed in range(count)]
        began.wait()
        process.send_signal(signal.SIGTERM)
        for finished in (future.result() for future in streams):
            assert sorted(finished) == list(range(n))
            assert set(finished.values()) <= {"stop", "length"}
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")
