"""Connections that wait for a request: for how long, and how many.

In: bytes from clients. Out: uvicorn's own protocol, with an end for connections that ask nothing.
"""

import asyncio
import contextlib
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 1024
_HEAD_SECONDS = 10.0
_OTHER_FILES = 256  # beside connections: logs, the store, the device's


class Connection(H11Protocol):
    """A client's connection.

    A request's head must be complete some seconds after its first byte, and a new connection's so long after its start;
    between requests uvicorn's `timeout_keep_alive` counts. Where there are too many connections, those that have waited
    longest for a request make room: they cost their clients nothing but another connection.

    Args:
        waiting: the connections without a request under way, the oldest first; one dictionary for all.
        args, kwargs: as uvicorn gives them.
    """

    def __init__(self, *args: Any, waiting: "dict[Connection, None]", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._waiting, self._timer = waiting, None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begins to wait for a request, in the place of another if need be."""
        super().connection_made(transport)
        limit = self.limit_concurrency
        if limit is not None and len(self.connections) >= limit and self._waiting:
            next(iter(self._waiting)).drop()
        self._wait()
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """From the first byte on, the rest of a head must come soon."""
        super().data_received(data)
        if self in self._waiting:
            self._expect_head()

    def handle_events(self) -> None:
        """A request may have begun."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()

    def on_response_complete(self) -> None:
        """Waits for the next request, if there may be one."""
        if not self.transport.is_closing():
            self._wait()
        super().on_response_complete()
        if self in self._waiting and self.conn.trailing_data[0]:
            self._expect_head()  # of which a part has come already

    def connection_lost(self, exc: Exception | None) -> None:
        """It waits no more."""
        self._forget()
        super().connection_lost(exc)

    def drop(self) -> None:
        """Ends the connection, once its client has read what was written."""
        self._forget()
        if not self.transport.get_write_buffer_size():
            self.connections.discard(self)  # at once: uvicorn counts them when the next request comes
        self.transport.close()

    def _wait(self) -> None:
        self._waiting[self] = None

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(_HEAD_SECONDS, self.drop)

    def _forget(self) -> None:
        self._waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def most_connections() -> int:
    """As many connections as this process may have open; the system is asked for enough first."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MOST_CONNECTIONS + _OTHER_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            return max(1, min(MOST_CONNECTIONS, soft - _OTHER_FILES))
    return MOST_CONNECTIONS
