"""A connection between the processes of a job that tells at once, and in words, when one of them is gone.

In: a started `jax.distributed`. Out: nothing while all goes well; when a process is lost, every other one prints which,
at which step, and how to go on, and ends with status 1.

JAX alone notices after a missed heartbeat, or at once where process 0 is gone, and aborts from C++ with a stack trace;
it stays behind this as the second net, and `linger_on_abort` lets this one speak first. Here each process holds a TCP
connection to process 0, which the kernel closes when either ends, however it ends; a host that vanishes without a word
is noticed by the kernel's keep-alive packets.
"""

import ctypes
import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from lora_gen_jax.training.c_signals import set_c_handler

KEY = "lora_gen_jax/peers"
CONNECT_SECONDS = 60
# What one process finds wrong, all others mostly find too, and say it better.
FAILURE_SECONDS = 5


class Peers:
    """This process's connection to the others.

    Args:
        client: of `jax.distributed`: its key-value store tells where process 0 listens.
        host: of process 0.
        process, processes: this one's number, and how many there are.
        seconds: how long a silent host counts as alive.
    """

    def __init__(self, client: Any, host: str, process: int, processes: int, seconds: int):
        self.process, self.processes, self.seconds = process, processes, seconds
        self.step, self.checkpoints, self.ending = 0, None, False
        self.sockets: dict[int, socket.socket] = {}
        self.lock = threading.Lock()
        linger_on_abort()
        if process:
            port, token = client.blocking_key_value_get(KEY, CONNECT_SECONDS * 1000).split()
            link = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
            link.sendall(f"{token} {process}\n".encode())
            self._watch(0, link)
        else:
            token = secrets.token_hex(16)
            listener = _listener()
            client.key_value_set(KEY, f"{listener.getsockname()[1]} {token}")
            threading.Thread(target=self._accept, args=(listener, token), daemon=True).start()

    def at(self, step: int, checkpoints: Path) -> None:
        """Notes how far training is and where its checkpoints lie, for the message."""
        self.step, self.checkpoints = step, checkpoints

    def end(self) -> None:
        """The job is done: connections that close from now on mean nothing."""
        self.ending = True
        self._tell("done")

    def cut(self) -> None:
        """This process fails: to the others it is lost from now on."""
        self.ending = True
        self._tell(f"failed {self.process}")
        for link in self.sockets.values():
            link.close()

    def _accept(self, listener: socket.socket, token: str) -> None:
        while len(self.sockets) < self.processes - 1:
            link, _ = listener.accept()
            link.settimeout(CONNECT_SECONDS)
            try:
                sent, process = link.makefile("r").readline().split()
            except (OSError, ValueError):
                sent, process = "", "0"
            if secrets.compare_digest(sent.encode(), token.encode()) and process.isdecimal():
                self._watch(int(process), link)
            else:
                link.close()
        listener.close()

    def _watch(self, peer: int, link: socket.socket) -> None:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Not every system has a name for each of these; its defaults, hours, then hold.
        for name, value in (
            ("TCP_KEEPIDLE", self.seconds // 3),
            ("TCP_KEEPINTVL", self.seconds // 6),
            ("TCP_KEEPCNT", 4),
        ):
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, value))
        self.sockets[peer] = link
        threading.Thread(target=self._listen, args=(peer, link), daemon=True).start()

    def _listen(self, peer: int, link: socket.socket) -> None:
        try:
            for line in link.makefile("r"):
                word, _, number = line.strip().partition(" ")
                if word == "done":
                    return
                if word == "failed":
                    time.sleep(FAILURE_SECONDS)
                if not self.ending:
                    self._lost(int(number))
        except OSError:
            pass
        if not self.ending:
            self._lost(peer)

    def _lost(self, peer: int) -> None:
        with self.lock:  # the first loss is the cause, all others follow from it
            # Before the connections to this process close, the others hear who it was.
            self._tell(f"lost {peer}")
            os.write(2, f"error: {self.message(peer)}\n".encode())
            time.sleep(0.0 if self.process else 0.5)
            os._exit(1)

    def message(self, peer: int) -> str:
        """What a user reads when a process is lost."""
        saved = (
            [] if self.checkpoints is None else [int(p.name) for p in self.checkpoints.glob("*") if p.name.isdigit()]
        )
        go_on = f"the run goes on from step {max(saved)}" if saved else "there is no checkpoint yet"
        return f"process {peer} of {self.processes} was lost at step {self.step}: start all processes again; {go_on}"

    def _tell(self, text: str) -> None:
        for link in list(self.sockets.values()):
            try:
                link.sendall(f"{text}\n".encode())
            except OSError:
                continue


def linger_on_abort() -> None:
    """From now on a thread that calls abort() ends the process six seconds later; the other threads run meanwhile.

    When process 0 is gone, its service and the connection here close in the same instant: without this, whether a user
    reads the message or JAX's stack trace is a race. The handler of SIGABRT is the C library's `sleep`, with the
    signal's number, 6, for seconds: it may run in a handler, needs no interpreter, and then abort() takes its course.
    """
    if os.name == "posix" and signal.SIGABRT == 6:
        set_c_handler(signal.SIGABRT, ctypes.cast(ctypes.CDLL(None).sleep, ctypes.c_void_p).value)


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)
