"""The process around the application: a socket, signals, and an end that loses no accepted request.

In: a `Service` and an address. Out: what the process's exit status should be.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.serving.app import make_app
from lora_gen_jax.serving.service import Service

log = logging.getLogger(__name__)
# After a signal, open connections are read for this long: what clients had sent by then is answered.
_LINGER_SECONDS = 0.3
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What is left of the time to end for rows whose clients were cut off: they stop at the next step.
_LEAST_SECONDS = 1.0


def bind(host: str, port: int) -> socket.socket:
    """A socket with its address; connections are refused until a server listens on it.

    Raises:
        ConfigError: when the address cannot be used.
    """
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
    return ConfigError(f"{what} cannot be listened on: {reason}; choose others")


class Server(uvicorn.Server):
    """Uvicorn with another end: SIGTERM or SIGINT finishes what was accepted, a second one stops at once.

    Args:
        service: that is told when the end begins.
        config: uvicorn's.
        ready: called when requests can come.
    """

    def __init__(self, service: Service, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self.service, self.ready = service, ready
        self.ending: float | None = None

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
        """Says that requests can come.

        Raises:
            ConfigError: when the address was taken in the meantime.
        """
        try:
            await super().startup(sockets)
        except OSError as error:
            raise _unusable("the address", error) from error
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more connections, reads what open ones have sent, and waits for their answers."""
        self.ending = time.monotonic()
        for server in self.servers:
            server.close()
        await asyncio.sleep(_LINGER_SECONDS)
        await super().shutdown(sockets)


def run_server(service: Service, listener: socket.socket, shutdown_timeout: float, ready: Callable[[], None]) -> int:
    """Serves until a signal comes.

    Args:
        service: what answers; its scheduler is closed in the end.
        listener: as `bind` returns it.
        shutdown_timeout: seconds from the signal to the end, at most.
        ready: called when requests can come.

    Returns:
        0 when every accepted request was answered, else 1.
    """
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(shutdown_timeout)),
    )
    server = Server(service, config, ready)
    server.run(sockets=[listener])
    service.closing = True
    service.close()
    used = 0.0 if server.ending is None else time.monotonic() - server.ending
    # Connections have all ended: what still runs answers nobody.
    finished = service.scheduler.close(max(_LEAST_SECONDS, shutdown_timeout - used))
    finished = finished and not server.force_exit and used < shutdown_timeout
    if not finished:
        print("stopped before every accepted request was answered (--shutdown-timeout)", file=sys.stderr)
    return 0 if finished else 1
