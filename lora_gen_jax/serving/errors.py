"""Errors as the HTTP interface says them: a status and OpenAI's JSON.

In: any `LoraGenError`. Out: `ApiError`, with the field it is about and a code for programs.
"""

import logging
import re
from typing import Any

from lora_gen_jax.errors import ConfigError, DataError, LoraGenError, ModelError
from lora_gen_jax.serving.scheduler import Closing, Failed, QueueFull

log = logging.getLogger(__name__)
# "(--checkpoint)", "(generate --input)": remedies for a command line, which a client does not have.
_FLAGS = re.compile(r" \([^()]*--[^()]*\)")
_RETRY = {"Retry-After": "1"}
CLIENT_GONE = 499  # nobody reads it: only for the metrics


class ApiError(LoraGenError):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        field: the request's, which OpenAI's JSON calls "param"; None where it is about none.
        code: for programs, as "model_not_found".
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message, field=param, code=code)
        self.status, self.headers = status, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


class ClientGone(ApiError):
    """The client closed its connection before it had its answer."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "the client closed the connection")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400."""
    return ApiError(400, message, param, code)


def too_late(seconds: float) -> ApiError:
    """Status 504."""
    return ApiError(
        504, f"no complete answer within {seconds:g} s: ask for fewer tokens, or try later", None, "timeout"
    )


def api_error(error: LoraGenError, param: str | None = None) -> ApiError:
    """What the interface says of an error from below: the request's fault (400), a full queue (429), or ours (5xx).

    Our own faults are only logged: they may name files of the server.

    Args:
        error: from the scheduler, the tokenizer or the generator.
        param: the field that bad input came from.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), None, "queue_full", _RETRY)
    if isinstance(error, Closing):
        return ApiError(503, str(error), None, "closing", _RETRY)
    if isinstance(error, Failed):
        return ApiError(503, str(error), None, "failed")
    if isinstance(error, DataError | ConfigError | ModelError):
        return invalid(_FLAGS.sub("", str(error)), param)
    log.error("a request failed: %s", error)
    return ApiError(500, "an error of the server; its log says more", None, "server_error")
