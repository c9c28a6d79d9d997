"""A server under load: many clients, many specialisations, bad requests, clients that leave, and an end in the middle.

Command:  python benchmarks/serve_load.py [--requests 10000] [--clients 64] [--specializations 40] [--end-at 0.97]
In:       the shipped pair and the prompts and queries of the embedded suite; the server is a process of its own.
Out:      wrong answers, accepted requests that were lost, latencies, rates, and the server's memory; status 1 if an
          answer is wrong or an accepted request was lost.

Every answer is compared with the offline one: `generate` with merged weights, greedy, one prompt at a time. Of the
requests 5 % are malformed and must be refused, 5 % are streams that the client leaves after the first event. A request
is accepted when all of it was sent before the signal, or when the server began to answer it.
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

ROOT = Path(__file__).parents[1]
MAX_TOKENS = 16
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


def offline_answers(count: int) -> tuple[dict[str, str], dict[tuple[str, str], tuple[str, int]], float]:
    """(prompts by name, (text, tokens) by (name, query), seconds): what the server must answer."""
    from lora_gen_jax import generate, merge
    from lora_gen_jax.adapters.specialization_fit import adapter_of
    from lora_gen_jax.data.pocket.suite import GROUPS
    from lora_gen_jax.data.prompts import evaluation_shots, system_prompt
    from lora_gen_jax.specializer import Specializer

    tasks = [*GROUPS["pocket_seen"](), *GROUPS["pocket_unseen"](), *GROUPS["pocket_reworded"]()][:count]
    specializer, answers, prompts = Specializer.load(None), {}, {}
    edge, loaded = specializer.pair.edge, specializer.loaded
    began = time.perf_counter()
    for number, task in enumerate(tasks):
        name = f"task-{number:03d}"
        prompts[name] = system_prompt(task.descriptions[0], evaluation_shots(task, 3, 0))
        # One at a time, as the server makes them: in a batch the last bit may differ.
        (made,) = specializer.specialize([prompts[name]])
        adapter = adapter_of(made, loaded.variables, loaded.config.generator)
        params = merge(edge.params, adapter)
        for query in {example.query for example in task.test}:
            ids = edge.encoder.text(query)
            (found,) = generate(
                edge.decoder, params, [ids], max_new_tokens=MAX_TOKENS, stop_ids=[edge.encoder.end or 0]
            )
            answers[name, query] = edge.encoder.decode(found.ids), len(found.ids)
    return prompts, answers, time.perf_counter() - began


class Load:
    """All clients and what they find."""

    def __init__(self, address: tuple[str, int], answers: dict[tuple[str, str], tuple[str, int]], flags: Any):
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
        await connection.send("/v1/completions", rng.choice(BAD) if kind == "bad" else json.dumps(ask).encode())
        progress["sent"] = time.monotonic()
        status, fields = await connection.head()
        progress["head"] = True
        if status == 429:
            await connection.body(fields)
            return False
        if kind == "left":
            connection.close()
            return True
        body = await connection.body(fields)
        if kind == "bad":
            if not 400 <= status < 500 or "error" not in json.loads(body):
                self.found.wrong.append(f"status {status} for a malformed request")
            return True
        self._compare(name, query, status, body, stream)
        return True

    def _compare(self, name: str, query: str, status: int, body: bytes, stream: bool) -> None:
        expected, tokens = self.answers[name, query]
        if status != 200:
            self.found.wrong.append(f"{name} {query!r}: status {status} {body[:200]!r}")
            return
        text = "".join(choice["text"] for part in _parts(body, stream) for choice in part["choices"])
        if text != expected:
            self.found.wrong.append(f"{name} {query!r}: {text!r}, not {expected!r}")
        self.found.tokens += tokens


def _parts(body: bytes, stream: bool) -> list[dict[str, Any]]:
    if not stream:
        return [json.loads(body)]
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    # A stream that was cut short lacks its last line.
    return [json.loads(line) for line in lines[:-1]] if lines[-1] == "[DONE]" else [{"choices": [{"text": "(cut)"}]}]


def memory(process: subprocess.Popen) -> float:
    """Resident memory in MB."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found[1]) / 1024 if found else float("nan")


async def run(process: subprocess.Popen, load: Load, prompts: dict[str, str]) -> tuple[int, int, float]:
    """Makes the specialisations, runs the clients, ends the server while they ask.

    Returns:
        requests, tokens and seconds until the signal.
    """
    maker = Connection(*load.address)
    for name, prompt in prompts.items():
        await maker.send("/v1/specializations", json.dumps({"name": name, "prompt": prompt}).encode())
        status, fields = await maker.head()
        body = await maker.body(fields)
        if status != 200:
            raise SystemExit(f"{name} was not specialised: {body!r}")
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


def serve_and_ask(
    flags: Any, prompts: dict[str, str], answers: dict[tuple[str, str], tuple[str, int]], log: Any
) -> int:
    """Runs a server and its clients, and prints what came of it.

    Returns:
        0 where nothing is wrong or lost.
    """
    command = [sys.executable, "-m", "lora_gen_jax", "serve", "--port", "0", "--queue", str(4 * flags.clients)]
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
    print(f"{len(answers)} answers of {len(prompts)} specialisations computed offline in {seconds:.0f} s")
    with tempfile.TemporaryFile("w+") as log:
        return serve_and_ask(flags, prompts, answers, log)


if __name__ == "__main__":
    sys.exit(main())
