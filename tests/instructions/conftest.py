"""A chat endpoint on this machine that separates made-up rows, and does what a test says instead."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

THINGS = ["sun", "moon", "star", "cat", "dog", "bird"]
ROWS = [
    *({"instruction": f"What colour does the {x} have?", "input": "", "output": f"{x} colour"} for x in THINGS),
    {"instruction": "Count the words.", "input": "red green blue", "output": "3"},
]
COLOUR, COUNT = "Name the colour of the thing.", "Count the words."

Answer = tuple[int, dict[str, str], str]


def right(row: dict[str, Any]) -> dict[str, str]:
    """What a good model makes of one of ROWS; the abstract's wording varies in case and punctuation."""
    if row["input"]:
        return {"abstract": row["instruction"], "query": row["input"]}
    thing = row["instruction"].split()[-2]
    return {"abstract": COLOUR if thing in THINGS[::2] else "name the colour of the thing", "query": thing}


def asked(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a request's first message ends with."""
    lines = body["messages"][0]["content"].rstrip("\n").split("\n")
    count = next(n for n, line in enumerate(reversed(lines)) if not line.startswith('{"'))
    return [json.loads(line) for line in lines[len(lines) - count :]]


def completion(content: Any) -> Answer:
    text = content if isinstance(content, str) else json.dumps(content)
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def failure(status: int, message: str = "", **headers: str) -> Answer:
    return status, headers, json.dumps({"error": {"message": message}})


class FakeEndpoint:
    """Answers rightly, unless `answer(body, number)` gives another answer; numbers are from 1, in order of arrival."""

    def __init__(self):
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answer: Callable[[dict[str, Any], int], Answer | None] = lambda body, number: None
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def rows_asked(self) -> list[str]:
        """The instructions of all requests' rows, sorted."""
        return sorted(row["instruction"] for body in self.bodies for row in asked(body))

    def _handler(fake) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.bodies.append(body)
                    fake.heads.append(dict(self.headers))
                    fake.paths.append(self.path)
                    number = len(fake.bodies)
                status, headers, text = fake.answer(body, number) or completion(right(asked(body)[0]))
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # the client has gone

            def log_message(self, format, *args):
                pass

        return Handler


@pytest.fixture
def fake(monkeypatch):
    """The endpoint, and no pauses: `fake.pauses` has their lengths in seconds."""
    from lora_gen_jax.instructions import endpoint

    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = FakeEndpoint()
    made.pauses = []
    monkeypatch.setattr(endpoint, "_wait", lambda closed, seconds: made.pauses.append(seconds) or closed.is_set())
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()
