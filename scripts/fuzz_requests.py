"""Sends hostile requests to a server and sees whether it stays well.

In: a number of requests and a seed. Out: a table in Markdown of what was answered; status 1 for an answer of 500 or
above, a traceback in the log, an answer that takes 10 seconds, 2 GB of memory, or a good request that is answered
otherwise afterwards.
Command: python scripts/fuzz_requests.py --requests 2000
The server is `lora-gen serve` on the pocket pair, a process of its own; several clients ask at the same time.
"""

import argparse
import collections
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hostile_requests import GOOD, Case, hostile

ROOT = Path(__file__).parents[1]
SECONDS, MEMORY = 10.0, 2e9
_WAIT = 0.3  # for an answer to what is no whole request; then the client leaves
_KEY = "a-key"


@dataclass(frozen=True)
class Outcome:
    """What came of a case: a status, None where the connection ended or the client left; and after how long.

    `silent`: the server read all of it, and ended the connection without a word.
    """

    case: Case
    status: int | None
    seconds: float
    silent: bool = False

    @property
    def wrong(self) -> str | None:
        """What must not be, None for all that may."""
        if self.seconds >= SECONDS:
            return f"no answer within {SECONDS:g} s"
        if self.silent and self.case.whole:
            return "no answer"
        return f"status {self.status}" if self.status is not None and self.status >= 500 else None


def send(address: tuple[str, int], case: Case) -> Outcome:
    """Sends one case over a connection of its own, and reads the first answer."""
    began, status, silent = time.monotonic(), None, False
    # Closed while it sends is an answer, too: servers need not read what they have refused.
    refusals = (OSError, http.client.HTTPException)
    with contextlib.suppress(*refusals), socket.create_connection(address, timeout=SECONDS) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(case.sent)
        if not case.whole:
            connection.settimeout(_WAIT)
        answer = http.client.HTTPResponse(connection)
        try:
            answer.begin()
        except http.client.RemoteDisconnected:
            silent = True
        else:
            status = answer.status
            answer.read()
    seconds = time.monotonic() - began
    return Outcome(case, status, seconds if case.whole else 0.0, silent)


def ask_good(address: tuple[str, int], key: str) -> list[object]:
    """What good requests are answered, without what differs from one to the next."""
    said = []
    for path, fields in GOOD:
        connection = http.client.HTTPConnection(*address, timeout=600)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("POST", path, json.dumps(fields), headers)
        answer = connection.getresponse()
        body = json.loads(answer.read())
        said.append((answer.status, body.get("choices"), body.get("prompt_tokens")))
        connection.close()
    return said


@contextlib.contextmanager
def server(log: Path) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    """The process and its address; what it says on standard error goes into the log."""
    flags = ["--checkpoint", "quickstart", "--port", "0", "--rows", "4", "--context", "64", "--max-new-tokens", "16"]
    flags += ["--store", str(log.parent / "store"), "--max-specializations", "9999"]
    environment = {**os.environ, "LORA_GEN_API_KEY": _KEY, "PYTHONPATH": str(ROOT)}
    with log.open("w") as written:
        command = [sys.executable, "-m", "lora_gen_jax", "serve", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=written, text=True, env=environment)
    try:
        assert process.stdout is not None
        found = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
        if not found:
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        yield process, (found[1], int(found[2]))
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
        process.wait()


def table(outcomes: Iterable[Outcome]) -> str:
    """Kinds of requests, how many there were, and how they were answered."""
    lines = ["| kind | requests | answers | slowest |", "|---|---|---|---|"]
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.case.kind, []).append(outcome)
    for kind, own in kinds.items():
        counts = collections.Counter("none" if one.status is None else str(one.status) for one in own)
        answers = ", ".join(f"{count} × {status}" for status, count in sorted(counts.items()))
        lines.append(f"| {kind} | {len(own)} | {answers} | {max(one.seconds for one in own):.1f} s |")
    return "\n".join(lines)


def _memory(process: int) -> float:
    """The most bytes that a process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return float(found[1]) * 1024 if found else 0.0


def main() -> int:
    """Asks, and prints; 1 when something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with server(log) as (process, address):
            before = ask_good(address, _KEY)
            with ThreadPoolExecutor(flags.clients) as clients:
                cases = hostile(flags.requests, flags.seed, _KEY)
                outcomes = list(clients.map(lambda case: send(address, case), cases))
            wrong = [f"{one.case.kind}: {one.wrong}: {one.case.sent[:300]!r}" for one in outcomes if one.wrong]
            after, memory = ask_good(address, _KEY), _memory(process.pid)
        said = log.read_text()
    wrong += ["good requests are answered otherwise afterwards"] * (after != before)
    wrong += [f"{memory / 1e9:.2f} GB of memory"] * (memory >= MEMORY)
    wrong += [f"the log holds a traceback:\n{said[-3000:]}"] * ("Traceback" in said)
    wrong += [f"exit status {process.returncode}"] * (process.returncode != 0)
    print(table(outcomes))
    print(f"\n{len(outcomes)} requests, {len(wrong)} wrong; {memory / 1e9:.2f} GB of memory at most")
    for line in wrong[:20]:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
