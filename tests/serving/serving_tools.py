"""A server in a thread, a scheduler that does as it is told, and what the tests of serving share."""

import contextlib
import threading
import time
from typing import Any

import uvicorn

from lora_gen_jax.serving.app import make_app
from lora_gen_jax.serving.scheduler import Tokens
from lora_gen_jax.serving.server import bind

KEY = "a-key"


PROMPTS = {"red": "say red what is the color ?", "two": "count one two three", "cat": "name a cat or a dog"}


TEMPLATE = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('a user must begin') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] }} . {% endfor %}answer :"
)


MAX_NEW_TOKENS = 24


def raw_request(body, length=None):
    """A completion's head and body, for a socket."""
    size = len(body) if length is None else length
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {size}\r\n\r\n".encode() + body


@contextlib.contextmanager
def serving(service, hosts=None, **settings):
    """The address of a server in a thread, with uvicorn's settings beside the usual ones."""
    listener = bind("127.0.0.1", 0)
    usual = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
    config = uvicorn.Config(make_app(service, hosts), **usual, **settings)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


class _Puppet:
    """A scheduler whose works say what the test wants; in the place of the real one where timing matters."""

    longest, rows, running, waiting, rank = 96, 4, 0, 0, 0
    read_tokens = generated_tokens = 0

    def __init__(self):
        self.works, self.listeners, self.cancelled, self.alive = [], [], [], True
        self.refusal = None

    def submit_all(self, works, listeners):
        if self.refusal is not None:
            raise self.refusal
        return [self.submit(work, listener) for work, listener in zip(works, listeners, strict=True)]

    def submit(self, work, listener):
        index = len(self.works)
        self.works.append(work)
        self.listeners.append(listener)
        puppet = self

        class Ticket:
            def cancel(self):
                puppet.cancelled.append(index)

        return Ticket()

    def say(self, index, ids, finish=None):
        self.listeners[index](Tokens(ids, [-0.5] * len(ids), finish))


Puppet: Any = _Puppet


def say_at_once(puppet, ids=(8, 9)):
    """Every work ends with these ids as soon as it is submitted."""
    submit = puppet.submit

    def answering(work, listener):
        ticket = submit(work, listener)
        puppet.say(len(puppet.works) - 1, list(ids), "stop")
        return ticket

    puppet.submit = answering
    return puppet


def wait_until(true, seconds=10):
    """Waits for another thread."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
