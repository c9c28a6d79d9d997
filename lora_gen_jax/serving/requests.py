"""Requests as OpenAI's clients send them: JSON in, checked requests out, or an `ApiError` that names the field.

Fields that change nothing here are ignored, those that ask for what is not offered must have a neutral value, unknown
ones are errors. Only the first mistake is reported: a list of all in a large body would block the event loop.
"""

import codecs
import difflib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from lora_gen_jax.serving.errors import ApiError, invalid
from lora_gen_jax.specialization.settings import Kind

MOST_CHOICES = 8
_LONGEST_STOP = 1000  # characters
_MOST_ITEMS = 4096  # messages or shots of a request: more than a context has tokens
_MOST_EXAMPLES, _MOST_STEPS = 64, 50  # to learn from, and times
# Lists and objects: more than twice what the fields allow. Hundreds of thousands would hold the event loop up.
_MOST_CONTAINERS = 32768
# Possessive, and with a last one that does not end: each character is looked at once.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_HINTS = {"prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "verbosity", "prediction"}
_LONGEST_NAME = 100  # characters of a client's field name that an error repeats

Request = TypeVar("Request", bound=BaseModel)


def read_request(kind: type[Request], body: bytes) -> Request:
    """A request from its body."""
    if _containers(body) > _MOST_CONTAINERS and _containers(_STRING.sub(b"", body)) > _MOST_CONTAINERS:
        message = f"the body has more than {_MOST_CONTAINERS} lists and objects: send several requests"
        raise invalid(message, None, "too_many_values")
    try:
        fields = from_json(body.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not valid JSON in UTF-8: {error}", None, "invalid_json") from None
    if not isinstance(fields, dict):
        raise invalid('the body must be a JSON object, as {"model": …}', None, "invalid_json")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _field_error(error) from None


def _containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _field_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    known = first.get("ctx", {}).get("field")
    path = ".".join(map(str, (*first["loc"], *(() if known is None else (known,))))) or None
    if known is not None:
        return invalid(f"{path} {first['msg']}", path, first["type"])
    if first["type"] == "missing":
        return invalid(f"{path} is missing: the request needs it", path, "missing_field")
    message = first["msg"].removeprefix("Value error, ")
    return invalid(f"{path}: {message[:1].lower()}{message[1:]}", path, "invalid_value")


class _Fields(BaseModel):
    """Fields that are read; of the others those that may be there.

    Attributes:
        neutral: what is not offered, with the values that do not ask for it; null always is one.
        ignored: what changes nothing here.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        kept = {}
        for name, value in fields.items():
            if name in cls.model_fields:
                if value is not None:  # null is how clients write that they leave a field out
                    kept[name] = value
            elif name in cls.neutral:
                if value is not None and value not in cls.neutral[name]:
                    values = " or ".join(map(json.dumps, cls.neutral[name] or (None,)))
                    raise _refused("unsupported_value", name, f"is not supported: leave it out, or give {values}")
            elif name not in cls.ignored:
                name = name[:_LONGEST_NAME]
                near = difflib.get_close_matches(name, cls.model_fields, n=1)
                remedy = f"did you mean {near[0]}?" if near else "leave it out"
                raise _refused("unknown_field", name, f"is not a known field: {remedy}")
        return kept


def _refused(code: Literal["unsupported_value", "unknown_field"], name: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(code, "{message}", {"message": message, "field": name})


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


def _examples(value: Any) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_EXAMPLES:
        raise ValueError(f'give a list of 1 to {_MOST_EXAMPLES} objects with "input" and "output"')
    return value


def _content(value: Any) -> str:
    """A text, or parts of type "text" joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise ValueError('give a text, or a list of {"type": "text", "text": …}; other contents are not supported')


class StreamOptions(_Fields):
    """What a stream tells beside the text; obfuscation is accepted and not done."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(_Fields):
    """Fields that completions and chat share."""

    neutral = {
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
    ignored = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", *_HINTS})

    model: str = Field(min_length=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)  # 0 or -1: all tokens
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class Completion(Sampled):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=1)


class Message(_Fields):
    """A turn of a conversation; `name` is accepted and not read.

    Clients send an answer's message back as they got it, with the fields that it has no use for.
    """

    neutral = {"refusal": (), "audio": (), "function_call": (), "tool_calls": ([],), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content)]
    name: str | None = None


Messages = Annotated[list[Message], FailFast(), Field(max_length=_MOST_ITEMS)]


def as_turns(messages: list[Message]) -> list[dict[str, str]]:
    """As chat templates read them: the newer name of the system's role is the older one."""
    roles = {"developer": "system"}
    return [{"role": roles.get(m.role, m.role), "content": m.content} for m in messages]


class Chat(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[Messages, Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    turns_as_examples: bool = False
    """With model auto: turns that are answered are examples to learn from, and only the last is answered."""

    @property
    def limit(self) -> int | None:
        """The newer name counts, where both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class NewSpecialization(_Fields):
    """POST /v1/specializations: exactly one of prompt, messages, and description with shots or examples.

    Shots are read. Examples are read as shots, and learned from, too: by the gates, or by a LoRA beside them; with
    `as_chat` in the edge model's chat template.
    """

    name: str | None = None
    prompt: str | None = None
    messages: Messages = []
    description: str | None = None
    shots: Annotated[list[Any], Field(max_length=_MOST_ITEMS)] | None = None
    examples: Annotated[list[Any] | None, PlainValidator(_examples)] = None
    refine: Kind | None = None
    steps: int | None = Field(None, ge=0, le=_MOST_STEPS)
    as_chat: bool = False
