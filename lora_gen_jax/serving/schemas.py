"""Requests as OpenAI's clients send them.

In: the bytes of a body. Out: a checked request, or an `ApiError` that names the field and the remedy. Fields that
change nothing here are ignored, those that ask for what is not offered must have a neutral value, unknown ones are
errors.
"""

import difflib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from lora_gen_jax.serving.errors import invalid

MOST_CHOICES = 8
_CACHE_HINTS = ("prompt_cache_key", "prompt_cache_retention")
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "verbosity", *_CACHE_HINTS}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_LONGEST_STOP = 1000  # characters


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, texts, ids or lists of ids, always as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(part, str) for part in value):
            return value
        if _ids(value):
            return [value]
        if all(_ids(part) for part in value):
            return value
    raise ValueError("give a text, a list of texts, token ids, or a list of lists of token ids; none of them empty")


def _ids(value: Any) -> bool:
    # A bool is an int to Python, and no token id.
    return isinstance(value, list) and bool(value) and all(type(part) is int for part in value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(s, str) and s for s in stops):
        raise ValueError("give a text or a list of at most 4 texts, none of them empty")
    if any(len(s) > _LONGEST_STOP for s in stops):
        raise ValueError(f"a stop text may have at most {_LONGEST_STOP} characters")
    return tuple(stops)


def _content(value: Any) -> str:
    """A text, or parts of type "text" joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise ValueError('give a text, or a list of {"type": "text", "text": …}; other contents are not supported')


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(_Strict):
    """What a stream tells beside the text; obfuscation is accepted and not done."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(_Strict):
    """Fields that completions and chat share."""

    model: str = Field(min_length=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class Completion(Sampled):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=1)


class Message(_Strict):
    """A turn of a conversation; `name` is accepted and not read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content)]
    name: str | None = None


def as_turns(messages: list[Message]) -> list[dict[str, str]]:
    """As chat templates read them: the newer name of the system's role is the older one."""
    roles = {"developer": "system"}
    return [{"role": roles.get(m.role, m.role), "content": m.content} for m in messages]


class Chat(Sampled):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False

    @property
    def limit(self) -> int | None:
        """The newer name counts, where both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class NewSpecialization(_Strict):
    """POST /v1/specializations: exactly one of prompt, messages, and description with shots."""

    name: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    description: str | None = None
    shots: list[dict[str, str]] | None = None

    @property
    def row(self) -> dict[str, Any]:
        """As `lora_gen_jax.data.prompt_sources.prompt_of` reads it."""
        given = {"prompt": self.prompt, "shots": self.shots, "description": self.description}
        turns = None if self.messages is None else as_turns(self.messages)
        return {name: value for name, value in {**given, "messages": turns}.items() if value is not None}


Request = TypeVar("Request", bound=BaseModel)


def read_request(kind: type[Request], body: bytes) -> Request:
    """A request from its body.

    Raises:
        ApiError: 400, for what is no JSON object or a field that cannot be used.
    """
    fields = _object(body)
    if kind is not NewSpecialization:
        fields = _supported(fields, kind)
    # OpenAI's clients may write null for a field that they leave out.
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _field_error(kind, error) from None


def _object(body: bytes) -> dict[str, Any]:
    def no_number(text: str) -> Any:
        raise ValueError(f"{text} is no JSON number")

    try:
        fields = json.loads(body, parse_constant=no_number)
        if b"\\u" in body:
            # Half a surrogate pair is a Python string, and no text: neither a tokenizer nor an answer can hold it.
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid("the body holds half a surrogate pair (\\ud800 to \\udfff): send whole characters") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(f"the body is not valid JSON: {reason[:200]}", None, "invalid_json") from None
    if not isinstance(fields, dict):
        raise invalid('the body must be a JSON object, as {"model": …}', None, "invalid_json")
    return fields


def _supported(fields: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """The fields that are read, after a look at those that are not offered."""
    kept = {}
    for name, value in fields.items():
        if name in kind.model_fields:
            kept[name] = value
        elif name in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[name]:
                neutral = " or ".join(json.dumps(choice) for choice in _NEUTRAL[name])
                raise invalid(f"{name} is not supported: leave it out, or give {neutral}", name, "unsupported_value")
        elif name not in _IGNORED:
            kept[name] = "" if value is None else value  # unknown, whatever its value: the model says so
    return kept


def _field_error(kind: type[BaseModel], error: ValidationError) -> Exception:
    first = error.errors(include_url=False)[0]
    path = ".".join(map(str, first["loc"])) or None
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), kind.model_fields, n=1)
        remedy = f"did you mean {near[0]}?" if near else "leave it out"
        return invalid(f"unknown field {path[:100] if path else ''}: {remedy}", path, "unknown_field")
    if first["type"] == "missing":
        return invalid(f"{path} is missing: the request needs it", path, "missing_field")
    message = first["msg"].removeprefix("Value error, ")
    return invalid(f"{path}: {message[:1].lower()}{message[1:]}", path, "invalid_value")
