"""Who is heard: requests to a name of this server, from programs and not from other sites' pages, and connections that
ask something.

In: bytes from clients, ASGI's messages. Out: those of good requests; the others are answered with an error, and
connections that ask nothing end. A browser sends whatever a page asks for, to addresses that the page itself could not
read: such requests bear the page's origin, or, where the page's own name was pointed at this machine (DNS rebinding),
that name as their host.
"""

import asyncio
import contextlib
import dataclasses
import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.serving.errors import ApiError
from lora_gen_jax.serving.web import error_response

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[a-zA-Z0-9._-]+)(:[0-9]{1,5})?")
_PATTERN = re.compile(r"\*|(\*\.)?[a-zA-Z0-9._-]+|\[[0-9a-fA-F:.]+\]")
_CLOSE = {"Connection": "close"}


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Names that a server answers to.

    Starlette's `TrustedHostMiddleware` knows only lists of names. Beyond this machine any address is as good as
    another: a page's name can be pointed anywhere, but an address as a host is what the browser really asks.

    Attributes:
        names: in small letters; "*.example.com" is any name below it, "*" any at all.
        addresses: also any IP address; otherwise those of this machine's own loopback.
    """

    names: frozenset[str] = frozenset({"localhost"})
    addresses: bool = False

    @classmethod
    def of(cls, listener: socket.socket, given: Sequence[str] = ()) -> "Hosts":
        """Of a bound socket: localhost, the names given, and, beyond loopback, this machine's name."""
        for name in given:
            if not _PATTERN.fullmatch(name):
                remedy = "give names without http:// and port, as example.com, *.example.com or [2001:db8::1]"
                raise ConfigError(f"--allowed-hosts has {name[:80]!r}", field="--allowed-hosts", remedy=remedy)
        local = is_loopback(listener)
        names = {"localhost", *(name.strip("[]") for name in given), *(() if local else (socket.gethostname(),))}
        return cls(frozenset(name.lower() for name in names), not local)

    def include(self, host: str) -> bool:
        """Whether a request's Host is one of them; any port will do."""
        if "*" in self.names:
            return True
        if not (found := _HOST.fullmatch(host)):
            return False
        name = found[1].strip("[]").rstrip(".").lower()
        if name in self.names or any(p.startswith("*.") and name.endswith(p[1:]) for p in self.names):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.addresses or address.is_loopback


def is_loopback(listener: socket.socket) -> bool:
    """Whether a bound socket can be reached only from this machine."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


class Guarded:
    """ASGI around the application: refuses other hosts, other sites' pages, and bodies of two lengths."""

    def __init__(self, app: ASGIApp, hosts: Hosts):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _error(self, headers: Headers) -> ApiError | None:
        # Without a host: HTTP/1.0, which no browser speaks.
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self.hosts.include(host):
            message = f"this server is not {host[:80]!r}: start it with --allowed-hosts if that is one of its names"
            return ApiError(403, message, "Host", "foreign_host", _CLOSE)
        if origin is not None and origin.lower() not in {f"{scheme}://{host}".lower() for scheme in ("http", "https")}:
            message = (
                f"pages of {origin[:80]!r} may not ask this server: ask from a program, or from a page of its own name"
            )
            return ApiError(403, message, "Origin", "foreign_origin", _CLOSE)
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy before this server may go by the other one, and see another request's beginning.
            message = "the body has a Content-Length and a Transfer-Encoding: send one of them"
            return ApiError(400, message, "Content-Length", "two_lengths", _CLOSE)
        return None


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
