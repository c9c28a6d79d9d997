"""The process around the application: a socket, signals, and an end that loses no accepted request.

In: a `Service` and an address. Out: what the process's exit status should be.
"""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.serving.app import make_app
from lora_gen_jax.serving.guard import Connection, Hosts, most_connections
from lora_gen_jax.serving.service import Service

log = logging.getLogger(__name__)
# After a signal, open connections are read for this long, or half the time to end: what clients had sent by then is
# answered.
_LINGER_SECONDS = 0.3
_POLL_SECONDS = 0.02
# A connection that is to be closed waits until its client has read everything; one that reads nothing is cut off.
_UNREAD_SECONDS = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Beyond the time to end, for requests that were cut off, and for their rows: they stop at the next step.
_LEAST_SECONDS = 1.0


def bind(host: str, port: int) -> socket.socket:
    """A socket with its address; connections are refused until a server listens on it."""
    with contextlib.ExitStack() as opened:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = opened.enter_context(socket.socket(family, kind))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except (OSError, UnicodeError) as error:
            raise _unusable(f"--host {host} --port {port}", error) from error
        opened.pop_all()  # bound: it stays open
        return bound


def _unusable(what: str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error)
    field = "--host" if isinstance(error, socket.gaierror | UnicodeError) else "--port"
    return ConfigError(f"{what} cannot be listened on: {reason}", field=field, remedy="choose others")


class Server(uvicorn.Server):
    """Uvicorn with another end: SIGTERM or SIGINT finishes what was accepted, a second one stops at once.

    Args:
        service: that is told when the end begins.
        config: uvicorn's.
        ready: called when requests can come.
        shutdown_timeout: seconds from the signal to the end, at most.

    Attributes:
        ending: when the end began, of `time.monotonic`; None before.
        unanswered: requests whose answers were cut off at the end.
    """

    def __init__(self, service: Service, config: uvicorn.Config, ready: Callable[[], None], shutdown_timeout: float):
        super().__init__(config)
        self.service, self.ready, self.shutdown_timeout = service, ready, shutdown_timeout
        self.ending: float | None = None
        self.unanswered = 0
        # Bytes that wait for the client of a closing connection, and since when they are as many.
        self._unread: dict[Any, tuple[int, float]] = {}

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signals again afterwards: an orderly end is a success."""
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server in order."""
        self.force_exit = self.should_exit
        self.should_exit = self.service.closing = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says that requests can come."""
        try:
            await super().startup(sockets)
        except OSError as error:
            raise _unusable("the address", error) from error
        self.ready()

    async def on_tick(self, counter: int) -> bool:
        """Cuts off, about once a second, who does not read."""
        if counter % 10 == 0:
            self._cut_off()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more connections, reads what open ones have sent, and waits until it is answered and read."""
        self.ending = time.monotonic()
        end = self.ending + self.shutdown_timeout
        for listening in (*self.servers, *(sockets or ())):
            listening.close()
        await asyncio.sleep(min(_LINGER_SECONDS, self.shutdown_timeout / 2))
        connections, tasks = self.server_state.connections, self.server_state.tasks
        for connection in list(connections):
            connection.shutdown()  # now, or after its answer
        while tasks and self._has_time(end):
            await asyncio.sleep(_POLL_SECONDS)
        self.unanswered = len(tasks)
        if tasks:
            for task in tasks:
                task.cancel()
            await asyncio.wait(list(tasks), timeout=_LEAST_SECONDS)  # they free their rows
        while connections and self._has_time(end):
            self._cut_off()
            await asyncio.sleep(_POLL_SECONDS)
        for connection in list(connections):
            _abort(connection)

    def _has_time(self, end: float) -> bool:
        return time.monotonic() < end and not self.force_exit

    def _cut_off(self) -> None:
        """Ends connections that are to be closed, but whose clients do not read what was written."""
        now, before = time.monotonic(), self._unread
        self._unread = {}
        for connection in list(self.server_state.connections):
            transport = connection.transport
            if not transport.is_closing():
                continue
            size = transport.get_write_buffer_size()
            known = before.get(connection)
            since = known[1] if known is not None and known[0] == size else now
            self._unread[connection] = size, since
            if now - since >= _UNREAD_SECONDS:
                _abort(connection)


def _abort(connection: Any) -> None:
    """Closes a connection whatever it has still to send."""
    connection.transport.abort()


def run_server(
    service: Service,
    listener: socket.socket,
    shutdown_timeout: float,
    ready: Callable[[], None],
    hosts: Hosts | None = None,
    page: bool = True,
) -> int:
    """Serves until a signal comes.

    Args:
        service: what answers; its scheduler is closed in the end.
        listener: as `bind` returns it.
        shutdown_timeout: seconds from the signal to the end, at most.
        ready: called when requests can come.
        hosts: names that it answers to; left out, those of this machine's loopback.
        page: whether the playground is shown at /.

    Returns:
        0 when every accepted request was answered, whether its client read the answer or not; else 1.
    """
    config = uvicorn.Config(
        make_app(service, hosts, page),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        http=functools.partial(Connection, waiting={}),  # pyright: ignore[reportArgumentType]
        timeout_keep_alive=75,
        limit_concurrency=most_connections(),
    )
    server = Server(service, config, ready, shutdown_timeout)
    server.run(sockets=[listener])
    service.closing = True
    service.close()
    used = 0.0 if server.ending is None else time.monotonic() - server.ending
    # Connections have all ended: what still runs answers nobody.
    finished = service.scheduler.close(max(_LEAST_SECONDS, shutdown_timeout - used))
    finished = finished and not server.force_exit and not server.unanswered
    if not finished:
        print("stopped before every accepted request was answered (--shutdown-timeout)", file=sys.stderr)
    return 0 if finished else 1
