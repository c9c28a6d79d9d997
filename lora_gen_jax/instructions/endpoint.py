"""A chat endpoint of OpenAI's kind over HTTP. In: messages. Out: the reply's text, or an error that says what to do.

What passes is tried again with growing pauses: 408, 409, 425, 429 and 5xx (honouring Retry-After), timeouts, and
connections that break. Requests may come from several threads.
"""

import email.utils
import http.client
import json
import logging
import random
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from lora_gen_jax.errors import EndpointError, LoraGenError
from lora_gen_jax.instructions.prompt import Message
from lora_gen_jax.instructions.settings import Settings

log = logging.getLogger(__name__)

_PASSING = (408, 409, 425, 429)
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_ASKED = 1.0, 60.0, 600.0  # seconds
_SHOWN = 300  # characters of an endpoint's own message that an error repeats


class RequestRefused(LoraGenError):
    """The endpoint refuses one request (400, 413, 422), after it has answered others."""


class Closed(Exception):
    """The work was ended while a request was waiting to be sent again."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, and take the key along to another host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


class Endpoint:
    """Sends conversations.

    Until a first request has been answered, what the endpoint refuses is put down to the settings: fields that it does
    not know are left out from then on (`response_format`, `temperature`, `max_tokens`), and other refusals end the
    work. Afterwards they are put down to the request.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.answered = False
        self.closed = threading.Event()
        self._left_out: set[str] = set()
        self._opener = urllib.request.build_opener(_NoRedirects())

    def close(self) -> None:
        """Ends pauses between retries; requests that are waiting raise `Closed`."""
        self.closed.set()

    def body(self, messages: list[Message], max_tokens: int) -> dict[str, Any]:
        """The JSON that is sent."""
        optional = {"temperature": 0, "max_tokens": max_tokens, "response_format": {"type": "json_object"}}
        kept = {name: value for name, value in optional.items() if name not in self._left_out}
        return {"model": self.settings.model, "messages": messages} | kept

    def ask(self, messages: list[Message], max_tokens: int) -> str:
        """The reply's text; "" where the model declined to give one.

        Raises:
            EndpointError: when no request of this kind will be answered, or this one was not after all retries.
            RequestRefused: when the endpoint refuses this conversation, and has answered others.
            Closed: when `close` was called meanwhile.
        """
        failures = 0
        while True:
            try:
                text = _content(self._send(self.body(messages, max_tokens)))
                self.answered = True
                return text
            except urllib.error.HTTPError as error:
                with error:
                    asked = error.headers.get("Retry-After")
                    moved = error.headers.get("Location") if 300 <= error.code < 400 else None
                    reason = self._status(error.code, f"the address is now {moved}" if moved else _message(error))
            except (OSError, http.client.HTTPException, _Malformed) as error:
                asked, reason = None, self._unanswered(error)
            if reason is None:
                continue
            failures += 1
            if failures > self.settings.retries:
                raise EndpointError(
                    f"{self._place()} {reason}, {failures} times; the same command goes on later",
                    field="--endpoint",
                    code="unanswered",
                )
            self._pause(failures, asked, reason)

    def _send(self, body: dict[str, Any]) -> bytes:
        if self.closed.is_set():
            raise Closed
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "lora-gen"}
        if self.settings.key is not None:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        request = urllib.request.Request(self.settings.url, json.dumps(body).encode(), headers, method="POST")
        with self._opener.open(request, timeout=self.settings.timeout) as response:
            return response.read()

    def _status(self, code: int, message: str) -> str | None:
        """What passes as words, None to send at once with fewer fields; everything else raises."""
        said = f": {message}" if message else ""
        if code in _PASSING or code >= 500:
            return f"answered with status {code}{said}"
        if code in (401, 403):
            key, name = self.settings.key, self.settings.key_name or "an environment variable"
            has = "was refused" if key else "is missing"
            raise EndpointError(
                f"{self._place()} answered with status {code}{said}",
                field="--api-key-env",
                remedy=f"The key {has}: put a valid one into {name} (--api-key-env names the variable)",
            )
        if code == 404:
            raise EndpointError(
                f"{self._place()} answered with status 404{said}",
                field="--endpoint",
                code="not found",
                remedy=f"Either there is no model {self.settings.model!r} (--model), or the address is not that of chat"
                " completions (--endpoint, as http://localhost:8000/v1)",
            )
        if code in (400, 413, 422):
            if self.answered:
                raise RequestRefused(
                    f"the endpoint refused the request with status {code}{said}", field="rows", code="refused"
                )
            if self._leave_out(message):
                return None
        raise EndpointError(f"{self._place()} answered with status {code}{said}", field="--endpoint", code="status")

    def _leave_out(self, message: str) -> bool:
        """Leaves out the optional field that the message names, or else the one that servers know least."""
        left = [name for name in ("response_format", "temperature", "max_tokens") if name not in self._left_out]
        named = [name for name in left if name in message] or [name for name in left if name == "response_format"]
        if not named:
            return False
        log.info("the endpoint refuses requests with %s (%s); going on without", named[0], message)
        self._left_out.add(named[0])
        return True

    def _unanswered(self, error: Exception) -> str:
        """What passes as words; raises where nothing was ever answered, and the address is likely to be wrong."""
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            return f"did not answer within {self.settings.timeout:g} s (--timeout)"
        words = f"cannot be reached ({cause})" if isinstance(error, urllib.error.URLError) else ""
        words = words or (
            str(error) if isinstance(error, _Malformed) else f"broke off ({str(cause) or type(cause).__name__})"
        )
        # A connection that was there and is lost passes; one that never was, or a page instead of JSON, does not.
        first = isinstance(error, _Malformed) or not isinstance(cause, ConnectionResetError | http.client.HTTPException)
        if first and not self.answered:
            raise EndpointError(
                f"{self._place()} {words}",
                field="--endpoint",
                code="unreachable",
                remedy="check the address and that the server is running",
            ) from error
        return words

    def _pause(self, failures: int, asked: str | None, reason: str) -> None:
        seconds = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
        wanted = _retry_after(asked)
        if wanted is not None:
            if wanted > _LONGEST_ASKED:
                raise EndpointError(
                    f"{self._place()} {reason}, and asks to wait {wanted:.0f} s; the command goes on then",
                    field="--endpoint",
                    code="asks to wait",
                )
            seconds = wanted
        log.info("the endpoint %s; sent again in %.1f s", reason, seconds)
        if _wait(self.closed, seconds):
            raise Closed

    def _place(self) -> str:
        return f"--endpoint {self.settings.url}"


class _Malformed(Exception):
    """An answer with status 200 that is no chat completion."""


def _wait(closed: threading.Event, seconds: float) -> bool:
    """Whether it was closed meanwhile."""
    return closed.wait(seconds)


def _content(data: bytes) -> str:
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        shown = data[:_SHOWN].decode("utf-8", "replace")
        raise _Malformed(f"answered with something other than a chat completion, {shown!r}") from None
    return content if isinstance(content, str) else ""


def _message(error: urllib.error.HTTPError) -> str:
    """The endpoint's own words, on one line."""
    try:
        text = error.read(65536).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        value = json.loads(text)
        value = value.get("error", value)
        text = str(value.get("message", value)) if isinstance(value, dict) else str(value)
    except (ValueError, RecursionError, AttributeError):
        pass
    return " ".join(text.split())[:_SHOWN]


def _retry_after(value: str | None) -> float | None:
    """Seconds, from seconds or a date; None where there is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
