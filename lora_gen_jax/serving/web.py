"""What every endpoint needs of HTTP: bodies within their limit, clients that leave, events, and measures.

In: ASGI's messages. Out: bytes, `ApiError`s, server-sent events.
"""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_gen_jax.serving.errors import CLIENT_GONE, ApiError, ClientGone
from lora_gen_jax.serving.service import Service

_BODY_SECONDS = 30.0
# After the time limit, for a client that reads its events slowly or not at all.
_READING_SECONDS = 10.0
# The rest of a body that is too long is not read: the connection ends.
_CLOSE = {"Connection": "close"}
_STARTED, _STATUS = "lora_gen.started", "lora_gen.status"


async def read_body(request: Request, limit: int) -> bytes:
    """A request's body, in JSON as its head says: pages of other sites may send texts and forms unasked."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes, the limit", None, "body_too_large", _CLOSE)
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        message = f"the body's type is {media[:80]!r}: send JSON, with the header Content-Type: application/json"
        raise ApiError(415, message, "Content-Type", "unsupported_media_type", _CLOSE)
    length = request.headers.get("content-length", "0")
    if int(length) > limit:  # digits, and not too many of them, or the head would have been refused
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS:g} s", None, "timeout", _CLOSE) from None


def check_key(request: Request, key: str | None) -> None:
    """A key, where the server has one."""
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Bytes: compare_digest takes no other text than ASCII.
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        message = "wrong or missing API key: send the header Authorization: Bearer KEY"
        raise ApiError(401, message, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})


def error_response(error: ApiError) -> Response:
    """An error as an answer."""
    return JSONResponse(error.body, error.status, error.headers)


@contextlib.asynccontextmanager
async def limited(receive: Receive, deadline: float, late: ApiError) -> AsyncIterator[None]:
    """Ends the block early, with `late` at a deadline of the event loop's clock, or when the client leaves.

    The body has been read before: the next thing that comes is the end of the connection.
    """
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        if not limit.expired():
            gone = True
            limit.reschedule(0.0)

    try:
        async with asyncio.timeout_at(deadline) as limit:
            task = asyncio.create_task(watch())
            try:
                yield
            finally:
                task.cancel()
    except TimeoutError:
        raise (ClientGone() if gone else late) from None


class Events(Response):
    """Server-sent events: a line of JSON each, "[DONE]" at the end.

    Args:
        events: dictionaries; an `ApiError` that it raises becomes the last event.
        deadline: of the event loop's clock. A client that does not even read soon after it that it came too late gets
            no more; its connection is cut off if it reads nothing of what was written (`server.py`).
        late: the last event then.
        on_end: called once, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[dict[str, Any]], deadline: float, late: ApiError, on_end: Callable[[], None]
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._deadline, self._late, self._on_end = events, deadline, late, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline + _READING_SECONDS):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._send_events(scope, receive, send)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            scope[_STATUS] = CLIENT_GONE
        except TimeoutError:
            scope[_STATUS] = 504
        finally:
            self._on_end()

    async def _send_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def say(text: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            async with limited(receive, self._deadline, self._late):
                async for event in self._events:
                    await say(json.dumps(event, ensure_ascii=False, allow_nan=False))
        except ClientGone:
            raise
        except ApiError as error:
            # The head with status 200 is out already.
            scope[_STATUS] = error.status
            await say(json.dumps(error.body, ensure_ascii=False))
            return
        await say("[DONE]")


class Measured:
    """ASGI around the application: counts and times every request, and tells clients of a closing server to go."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = scope[_STARTED] = time.monotonic()
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.service.closing:
                    kept = [pair for pair in message["headers"] if pair[0].lower() != b"connection"]
                    message["headers"] = [*kept, (b"connection", b"close")]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # The route's pattern, not the path: there are as many of these as clients please.
            endpoint = getattr(scope.get("route"), "path", "other")
            metrics = self.service.metrics
            metrics.requests.labels(endpoint, scope.get(_STATUS, status)).inc()
            metrics.seconds.labels(endpoint).observe(time.monotonic() - started)


def seconds_since_start(request: Request) -> float:
    """Since the request's head was read."""
    return time.monotonic() - request.scope[_STARTED]
