"""Requests as OpenAI's clients send them: the fields that are read, and what their values may be.

In: fields of a body (`bodies.py` reads them). Out: checked requests.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator

MOST_CHOICES = 8
_LONGEST_STOP = 1000  # characters
_MOST_ITEMS = 4096  # messages or shots of a request: more than a context has tokens
_MOST_EXAMPLES, _MOST_STEPS = 64, 50  # to learn from, and times


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


def _shots(value: Any) -> list[Any]:
    """What one shot holds is looked at later, when they become a prompt."""
    if not isinstance(value, list) or len(value) > _MOST_ITEMS:
        raise ValueError(f'give a list of at most {_MOST_ITEMS} objects with "input" and "output"')
    return value


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


class Message(_Strict):
    """A turn of a conversation; `name` is accepted and not read."""

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


class NewSpecialization(_Strict):
    """POST /v1/specializations: exactly one of prompt, messages, and description with shots or examples.

    Shots are read. Examples are read as shots, and learned from, too: by the gates, or by a LoRA beside them; with
    `as_chat` in the edge model's chat template.
    """

    name: str | None = None
    prompt: str | None = None
    messages: Messages = []
    description: str | None = None
    shots: Annotated[list[Any] | None, PlainValidator(_shots)] = None
    examples: Annotated[list[Any] | None, PlainValidator(_examples)] = None
    refine: Literal["gates", "lora"] | None = None
    steps: int | None = Field(None, ge=0, le=_MOST_STEPS)
    as_chat: bool = False

    @property
    def row(self) -> dict[str, Any]:
        """As `lora_gen_jax.data.prompt_sources.prompt_of` reads it."""
        given = {"prompt": self.prompt, "shots": self.shots, "description": self.description}
        turns = as_turns(self.messages) if "messages" in self.model_fields_set else None
        return {name: value for name, value in {**given, "messages": turns}.items() if value is not None}
