"""Bodies of requests, in JSON.

In: bytes. Out: a checked request, or an `ApiError` that names the field and the remedy. Fields that change nothing here
are ignored, those that ask for what is not offered must have a neutral value, unknown ones are errors. The first
mistake is told alone: a list of all that a large body can hold would hold the event loop up.
"""

import difflib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lora_gen_jax.serving.errors import invalid
from lora_gen_jax.serving.schemas import Message, Sampled, StreamOptions

_HINTS = {"prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "verbosity", "prediction"}
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", *_HINTS}
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
# Clients send an answer's message back as they got it, with the fields that it has no use for.
_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "annotations": ([],),
}
# Lists and objects: more than twice what `schemas` allows. Hundreds of thousands would hold the event loop up.
_MOST_CONTAINERS = 32768
# Possessive, and with a last one that does not end: each character is looked at once.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_LONGEST_NAME = 100  # characters of a client's field name that an error repeats

Request = TypeVar("Request", bound=BaseModel)


def read_request(kind: type[Request], body: bytes) -> Request:
    """A request from its body.

    Raises:
        ApiError: 400, for what is no JSON object or a field that cannot be used.
    """
    offered = (_NEUTRAL, _IGNORED) if issubclass(kind, Sampled) else ({}, ())
    fields = _read_fields(_object(body), kind, *offered)
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = _read_fields(options, StreamOptions, path="stream_options.")
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [
            _read_fields(message, Message, _MESSAGE_NEUTRAL, path=f"messages.{number}.")
            if isinstance(message, dict)
            else message
            for number, message in enumerate(messages)
        ]
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _field_error(error) from None


def _object(body: bytes) -> dict[str, Any]:
    def no_number(text: str) -> Any:
        raise ValueError(f"{text} is not a JSON number")

    try:
        # Bytes alone would be read as UTF-16, too, and halves of surrogate pairs let through.
        text = body.decode("utf-8-sig")
        _check_containers(text)
        fields = json.loads(text, parse_constant=no_number)
        if "\\u" in text:
            # Half a surrogate pair is a Python string, and no text: neither a tokenizer nor an answer can hold it.
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid("the body holds half a surrogate pair (\\ud800 to \\udfff): send whole characters") from None
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8 text: encode the JSON as UTF-8", None, "invalid_json") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(f"the body is not valid JSON: {reason[:200]}", None, "invalid_json") from None
    if not isinstance(fields, dict):
        raise invalid('the body must be a JSON object, as {"model": …}', None, "invalid_json")
    return fields


def _check_containers(text: str) -> None:
    """Raises ApiError (400) for more lists and objects than any request needs, before they are made."""

    def many(text: str) -> bool:
        return text.count("[") + text.count("{") > _MOST_CONTAINERS

    # Those inside of texts are none.
    if many(text) and many(_STRING.sub("", text)):
        message = f"the body has more than {_MOST_CONTAINERS} lists and objects: send several requests"
        raise invalid(message, None, "too_many_values")


def _read_fields(
    fields: dict[str, Any],
    model: type[BaseModel],
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    ignored: Collection[str] = (),
    path: str = "",
) -> dict[str, Any]:
    """The fields that a model reads, after a look at the others; null is how clients write that they leave one out."""
    neutral, kept = neutral or {}, {}
    for name, value in fields.items():
        if name in model.model_fields:
            if value is not None:
                kept[name] = value
        elif name in neutral:
            if value is not None and value not in neutral[name]:
                values = " or ".join(map(json.dumps, neutral[name] or (None,)))
                raise invalid(
                    f"{path}{name} is not supported: leave it out, or give {values}", path + name, "unsupported_value"
                )
        elif name not in ignored:
            raise _unknown(name[:_LONGEST_NAME], model, path)
    return kept


def _unknown(name: str, model: type[BaseModel], path: str) -> Exception:
    near = difflib.get_close_matches(name, model.model_fields, n=1)
    remedy = f"did you mean {near[0]}?" if near else "leave it out"
    return invalid(f"unknown field {path}{name}: {remedy}", path + name, "unknown_field")


def _field_error(error: ValidationError) -> Exception:
    first = error.errors(include_url=False)[0]
    path = ".".join(map(str, first["loc"])) or None
    if first["type"] == "missing":
        return invalid(f"{path} is missing: the request needs it", path, "missing_field")
    message = first["msg"].removeprefix("Value error, ")
    return invalid(f"{path}: {message[:1].lower()}{message[1:]}", path, "invalid_value")
