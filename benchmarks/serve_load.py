"""A server under load: many clients, many specializations, bad requests, clients that leave, and an end in the middle.

Command:  python benchmarks/serve_load.py [--requests 10000] [--clients 64] [--specializations 40] [--end-at 0.97]
In:       the shipped pair and the prompts and queries of the embedded suite; the server is a process of its own.
Out:      wrong answers, accepted requests that were lost, latencies, rates, and the server's memory; status 1 if an
          answer is wrong or an accepted request was lost.

Every answer, its finish reason and its usage are compared with the offline one (`serve_answers.py`). Of the requests
5 % are malformed and must be refused, 5 % are long streams that the client leaves after the first event, while they are
generated. A request is accepted when all of it was sent before the signal, or when the server began to answer it.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from http_connection import Connection
from serve_answers import GENERATOR, MAX_TOKENS, Answer, Answers, offline_answers

ROOT = Path(__file__).parents[1]
LEFT_TOKENS = 256  # of streams that nobody reads to their end
BAD = [
    b"{",
    b'{"model": "nobody", "prompt": "a"}',
    b'{"model": "base"}',
    b'{"model": "base", "prompt": "a", "max_tokens": -1}',
    b'{"model": "base", "prompt": "a", "temperature": NaN}',
    b'{"model": "base", "prompt": "a", "surprise": 1}',
    b'{"model": "base", "prompt": [99999999]}',
]


@dataclass
class Found:
    """What came of all requests."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    signalled: float | None = None

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


class Load:
    """All clients and what they find."""

    def __init__(self, address: tuple[str, int], answers: Answers, flags: Any):
        self.address, self.answers, self.flags = address, answers, flags
        self.keys = sorted(answers)
        self.found, self.numbers = Found(), iter(range(flags.requests))

    async def client(self) -> None:
        """Asks until there are no more requests, or no server."""
        connection = Connection(*self.address)
        for number in self.numbers:
            began = time.perf_counter()
            rng = random.Random(number)
            kind = rng.choices(("answer", "stream", "bad", "left"), (60, 30, 5, 5))[0]
            progress = {"head": False}
            try:
                answered = await self._ask(connection, rng, kind, progress)
            except (OSError, EOFError, asyncio.IncompleteReadError) as error:
                connection.close()
                if (
                    self.found.signalled is None
                    or progress["head"]
                    or progress.get("sent", 1e99) < self.found.signalled
                ):
                    self.found.lost.append(f"request {number} ({kind}): {type(error).__name__} {error}")
                else:
                    self.found.count("not accepted after the signal")
                if self.found.signalled is not None:
                    return
                continue
            self.found.count(kind if answered else f"{kind}, refused as the queue was full")
            if kind in ("answer", "stream"):
                self.found.seconds.append(time.perf_counter() - began)

    async def _ask(self, connection: Connection, rng: random.Random, kind: str, progress: dict[str, Any]) -> bool:
        name, query = self.keys[rng.randrange(len(self.keys))]
        stream = kind in ("stream", "left")
        ask = {"model": name, "prompt": query, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": stream}
        if stream:
            ask["stream_options"] = {"include_usage": True}
        if kind == "left":
            # The unspecialized model at a high temperature goes on and on.
            ask |= {"model": "base", "max_tokens": LEFT_TOKENS, "temperature": 2, "n": 2}
        await connection.send("/v1/completions", rng.choice(BAD) if kind == "bad" else json.dumps(ask).encode())
        progress["sent"] = time.monotonic()
        status, fields = await connection.head()
        progress["head"] = True
        if status == 429:
            await connection.body(fields)
            return False
        if kind == "left":
            first = await anext(connection.chunks())
            connection.close()
            if status != 200 or not json.loads(first.removeprefix(b"data: ")).get("choices"):
                self.found.wrong.append(f"status {status}, {first[:200]!r} as the first event of a stream")
            return True
        body = await connection.body(fields)
        if kind == "bad":
            if not 400 <= status < 500 or "error" not in json.loads(body):
                self.found.wrong.append(f"status {status} for a malformed request")
            return True
        self._compare(name, query, status, body, stream)
        return True

    def _compare(self, name: str, query: str, status: int, body: bytes, stream: bool) -> None:
        expected = self.answers[name, query]
        if status != 200:
            self.found.wrong.append(f"{name} {query!r}: status {status} {body[:200]!r}")
            return
        parts = _parts(body, stream)
        choices = [choice for part in parts for choice in part["choices"]]
        text = "".join(choice["text"] for choice in choices)
        answer = Answer(text, choices[-1]["finish_reason"] if choices else "", parts[-1].get("usage") or {})
        if answer != expected:
            self.found.wrong.append(f"{name} {query!r}: {answer}, not {expected}")
        self.found.tokens += expected.usage["completion_tokens"]


def _parts(body: bytes, stream: bool) -> list[dict[str, Any]]:
    if not stream:
        return [json.loads(body)]
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    # A stream that was cut short lacks its last line.
    cut = {"text": "(cut)", "finish_reason": ""}
    return [json.loads(line) for line in lines[:-1]] if lines[-1:] == ["[DONE]"] else [{"choices": [cut]}]


def memory(process: subprocess.Popen) -> float:
    """Resident memory in MB."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found[1]) / 1024 if found else float("nan")


async def run(process: subprocess.Popen, load: Load, prompts: dict[str, str]) -> tuple[int, int, float]:
    """Makes the specializations, runs the clients, ends the server while they ask.

    Returns:
        requests, tokens and seconds until the signal.
    """
    maker = Connection(*load.address)
    for name, prompt in prompts.items():
        await maker.send("/v1/specializations", json.dumps({"name": name, "prompt": prompt}).encode())
        status, fields = await maker.head()
        body = await maker.body(fields)
        if status != 200:
            raise SystemExit(f"{name} was not specialized: {body!r}")
    maker.close()
    found, began = load.found, time.perf_counter()
    found.memory["start"] = memory(process)
    clients = [asyncio.create_task(load.client()) for _ in range(load.flags.clients)]
    while sum(found.counts.values()) < load.flags.end_at * load.flags.requests:
        if "middle" not in found.memory and sum(found.counts.values()) > load.flags.requests / 2:
            found.memory["middle"] = memory(process)
        if all(client.done() for client in clients):
            break
        await asyncio.sleep(0.005)
    until_signal = sum(found.counts.values()), found.tokens, time.perf_counter() - began
    found.memory["end"] = memory(process)
    found.signalled = time.monotonic()
    process.send_signal(signal.SIGTERM)
    for client in clients:
        await client
    return until_signal


def report(found: Found, until_signal: tuple[int, int, float], status: int) -> None:
    """Prints the figures."""
    done, tokens, seconds = until_signal
    ranked = sorted(found.seconds)
    p50, p99 = statistics.median(ranked), ranked[int(0.99 * (len(ranked) - 1))]
    print(f"wrong answers            {len(found.wrong)}")
    print(f"lost accepted requests   {len(found.lost)}")
    print(f"requests                 {', '.join(f'{n} {what}' for what, n in sorted(found.counts.items()))}")
    print(f"latency                  p50 {1e3 * p50:.0f} ms, p99 {1e3 * p99:.0f} ms")
    print(f"rate                     {done / seconds:.0f} requests/s, {tokens / seconds:.0f} tokens/s")
    print("server's memory          " + ", ".join(f"{when} {mb:.0f} MB" for when, mb in found.memory.items()))
    print(f"server's exit status     {status}")
    for line in [*found.wrong[:5], *found.lost[:5]]:
        print(f"  {line}")


def serve_and_ask(flags: Any, prompts: dict[str, str], answers: Answers, log: Any) -> int:
    """Runs a server and its clients, and prints what came of it.

    Returns:
        0 where nothing is wrong or lost.
    """
    command = [sys.executable, "-m", "lora_gen_jax", "serve", "--checkpoint", GENERATOR, "--port", "0"]
    command += ["--queue", str(4 * flags.clients)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        address = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
        if address is None:
            log.seek(0)
            raise SystemExit(f"the server did not start: {log.read()}")
        load = Load((address[1], int(address[2])), answers, flags)
        until_signal = asyncio.run(run(process, load, prompts))
        status = process.wait(120)
    finally:
        process.kill()
    report(load.found, until_signal, status)
    return 1 if load.found.wrong or load.found.lost or status else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--specializations", type=int, default=40)
    parser.add_argument("--end-at", type=float, default=0.97, help="part of the requests before the signal")
    flags = parser.parse_args()
    prompts, answers, seconds = offline_answers(flags.specializations)
    print(f"{len(answers)} answers of {len(prompts)} specializations computed offline in {seconds:.0f} s")
    with tempfile.TemporaryFile("w+") as log:
        return serve_and_ask(flags, prompts, answers, log)


if __name__ == "__main__":
    sys.exit(main())
