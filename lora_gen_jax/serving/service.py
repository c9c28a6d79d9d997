"""What a server answers with: the edge model's rows, the specializations, and the generator that makes new ones.

In: checked requests. Out: works for the scheduler, and `Entry`s. Called from the event loop; prompts are read by the
cloud model in one thread of its own, one after the other, so that the loop stays free.
"""

import asyncio
import dataclasses
import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jinja2
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from lora_gen_jax.adapters.specialization import save_specialization
from lora_gen_jax.buckets import check_tokens
from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.data.prompt_sources import prompt_of, solved_rows
from lora_gen_jax.data.record_rows import text_field
from lora_gen_jax.errors import DataError, LoraGenError
from lora_gen_jax.models import end_ids
from lora_gen_jax.serving.errors import ApiError, api_error, invalid
from lora_gen_jax.serving.registry import AUTO, AUTOMATIC, BASE, Entry, Registry, Served
from lora_gen_jax.serving.requests import NewSpecialization, as_turns
from lora_gen_jax.serving.scheduler import Scheduler
from lora_gen_jax.serving.stored import remove_directory
from lora_gen_jax.specialization.prompt import Prompt
from lora_gen_jax.specialization.settings import RefineConfig
from lora_gen_jax.specializer import Specializer

_MOST_CHARACTERS = 65536  # of examples: learning from them takes several times as long as reading


def requested_prompt(request: NewSpecialization) -> str | Prompt:
    """What a request wants a specialization of."""
    given = request.model_dump(include={"prompt", "shots", "description"}, exclude_none=True)
    row = given | ({"messages": as_turns(request.messages)} if "messages" in request.model_fields_set else {})
    if request.examples is None:
        for name in ("refine", "steps", "as_chat"):
            if getattr(request, name):
                raise DataError(f'"{name}" is about "examples"', field=name, remedy="give them, or leave it out")
        return prompt_of(row)
    if len(row) > 1 or not row.keys() <= {"prompt", "description"}:
        problem = '"examples" go with "description" or "prompt" only'
        raise DataError(problem, field="examples", code="count", remedy="leave the others out")
    description = text_field(row, next(iter(row))) if row else ""
    return Prompt(description, solved_rows(request.examples, "example"), request.as_chat)


def refinement_of(
    prompt: str | Prompt, specializer: Specializer, rank: int, request: NewSpecialization | None = None
) -> RefineConfig | None:
    """How a prompt's examples are learned from; None where it has none, or no steps are asked for.

    Args:
        prompt: with examples, or a text.
        specializer: that reads it.
        rank: of the factors that a row has room for.
        request: that asks for a kind and a number of steps; None for a conversation.
    """
    if isinstance(prompt, str) or (request is not None and request.steps == 0):
        return None
    characters = sum(len(shot.query) + len(shot.response) for shot in prompt.shots)
    if characters > _MOST_CHARACTERS:
        message = f"the examples have {characters} characters, the limit is {_MOST_CHARACTERS}: give fewer"
        raise invalid(message, "messages" if request is None else "examples")
    config = specializer.refinement() if request is None else specializer.refinement(request.refine, request.steps)
    if config.trains_factors and config.rank > rank:
        message = (
            f"refine is {config.kind}, but this server was started without --refined-rank {config.rank}: use gates"
        )
        raise invalid(message, "refine", "unsupported_value")
    return config


def learned_turns(system: str, turns: list[dict[str, str]]) -> Prompt:
    """A conversation whose turns before the last are examples; the last waits for its answer."""
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        message = "turns_as_examples needs a user's and the assistant's turns one after another, the last a user's"
        raise invalid(message, "messages")
    texts = [turn["content"] for turn in turns]
    try:
        return Prompt(system, list(zip(texts[:-1:2], texts[1::2], strict=True)), chat=True)
    except DataError as error:
        raise api_error(error, "messages") from error


def digest(prompt: str | Prompt) -> str:
    """16 hex digits of a system message, and of examples behind it."""
    text = prompt
    if isinstance(prompt, Prompt):
        text = json.dumps([prompt.description, *((shot.query, shot.response) for shot in prompt.shots)])
    return hashlib.sha256(str(text).encode()).hexdigest()[:16]


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and histograms of one server; what the scheduler and the registry hold is read when somebody asks."""

    def __init__(self, scheduler: Any, registry: Any):
        self._scheduler, self._registry = scheduler, registry
        self._names = own = CollectorRegistry()
        self.requests = Counter("lora_gen_requests", "Requests.", ["endpoint", "status"], registry=own)
        self.cancelled = Counter("lora_gen_cancelled", "Sequences that nobody waited for any longer.", registry=own)
        text = "From a request's head to the end of its answer."
        self.seconds = Histogram("lora_gen_request_seconds", text, ["endpoint"], buckets=_SECONDS, registry=own)
        text = "From a request's head to its first token."
        self.first_token = Histogram("lora_gen_first_token_seconds", text, buckets=_SECONDS, registry=own)
        own.register(self)  # pyright: ignore[reportArgumentType]

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._names)

    def collect(self) -> Iterator[Any]:
        """What is read at the moment of asking."""
        s = self._scheduler
        yield GaugeMetricFamily("lora_gen_rows", "Sequences that can be generated at a time.", s.rows)
        yield GaugeMetricFamily("lora_gen_rows_busy", "Sequences that are being generated.", s.running)
        yield GaugeMetricFamily("lora_gen_queue_length", "Sequences that wait for a row.", s.waiting)
        served = len(self._registry)
        yield GaugeMetricFamily("lora_gen_specializations", "Specializations that can be asked for.", served)
        yield CounterMetricFamily("lora_gen_read_tokens", "Tokens of prompts.", s.read_tokens)
        yield CounterMetricFamily("lora_gen_generated_tokens", "New tokens.", s.generated_tokens)


Result = TypeVar("Result")
_LONG_TEXT = 16384  # characters; tokenizing more holds the event loop up for longer than a step of the model
_MOST_WAITING = 64  # prompts that wait for the cloud model


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_new_tokens: of one sequence.
        body_bytes: of a request.
        timeout: seconds from the request's head to its last token.
        sequences: prompts × n of one request.
    """

    max_new_tokens: int = 512
    body_bytes: int = 1 << 20
    timeout: float = 120.0
    sequences: int = 256


class Service:
    """Everything that the endpoints use.

    Args:
        scheduler: of the edge model.
        specializer: the generator and its models.
        registry: of specializations that were read already.
        limits: of one request.
        api_key: that requests must bear; None: anybody may ask.

    Attributes:
        closing: the server ends; answers under way are finished.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        specializer: Specializer,
        registry: Registry,
        limits: Limits | None = None,
        api_key: str | None = None,
    ):
        self.scheduler, self.specializer, self.registry = scheduler, specializer, registry
        self.limits, self.api_key = limits or Limits(), api_key
        self.encoder: Encoder = specializer.pair.edge.encoder
        self.stop_ids = end_ids(specializer.config.edge.source, specializer.pair.edge)
        self.metrics = Metrics(scheduler, registry)
        self.served = dataclasses.replace(Served.of(specializer), rank=scheduler.rank)
        self.closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="specialize")
        self._waiting = 0
        self._automatic: dict[str, asyncio.Task[Entry]] = {}
        self._removing: set[str] = set()

    @property
    def chats(self) -> bool:
        """Whether the edge model has a chat template."""
        return bool(self.encoder.tokenizer.chat_template)

    @property
    def healthy(self) -> bool:
        return self.scheduler.alive and not self.closing

    def entry(self, name: str) -> Entry:
        """A specialization by name."""
        found = self.registry.get(name)
        if found is None or name in self._removing:
            known = "GET /v1/models lists what there is, POST /v1/specializations makes more"
            raise ApiError(404, f"there is no specialization {name[:80]!r}: {known}", "model", "model_not_found")
        return found

    def special(self, model: str) -> Entry | None:
        """The specialization that a model's name stands for; None for the base model."""
        if model == AUTO:
            raise invalid("model auto needs a system message: use /v1/chat/completions", "model")
        return None if model == BASE else self.entry(model)

    async def prompt_ids(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of a completion's prompts."""

        def ids(prompt: str | list[int]) -> list[int]:
            if isinstance(prompt, str):
                self._check_length(len(prompt))
                return self.encoder.text(prompt)
            check_tokens(prompt, self.encoder.vocab_size, "prompt")
            return prompt

        try:
            return await _tokenized(lambda: [ids(prompt) for prompt in prompts], sum(map(len, prompts)))
        except LoraGenError as error:
            raise api_error(error, "prompt") from error

    async def chat_ids(self, turns: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation that waits for its answer."""
        try:
            size = sum(len(turn["content"]) for turn in turns)
            self._check_length(size)
            ids = await _tokenized(lambda: self.encoder.chat(turns), size)
        except jinja2.TemplateError as error:
            raise invalid(f"the model's chat template refuses these messages: {error}", "messages") from error
        except LoraGenError as error:
            raise api_error(error, "messages") from error
        if not ids:
            raise invalid("the messages are empty: give at least one with text", "messages")
        return ids

    def _check_length(self, characters: int) -> None:
        """Raises ApiError (400) for a text that has no room, before it is made into tokens."""
        if self.encoder.exceeds(characters, self.scheduler.longest):
            message = (
                f"the prompt has {characters} characters, the limit is {self.scheduler.longest} tokens: shorten it"
            )
            raise invalid(message, None, "context_length_exceeded")

    async def automatic(
        self, turns: list[dict[str, str]], turns_as_examples: bool = False
    ) -> tuple[Entry, list[dict[str, str]]]:
        """The specialization of a conversation's system message, and the other messages.

        It is made when the message is seen first; requests that come meanwhile wait for the same one. With
        `turns_as_examples` it learns from the turns that are answered, and only the last message is left.
        """
        system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
        others = [turn for turn in turns if turn["role"] != "system"]
        if not system.strip() or not others:
            missing = "system message: add one, or use model base" if others else "message of a user: add one"
            message = f"model auto specializes for the system message and answers the others: there is no {missing}"
            raise invalid(message, "messages")
        prompt: str | Prompt = system
        if turns_as_examples and len(others) > 1:
            prompt, others = learned_turns(system, others), others[-1:]
        name = AUTOMATIC + digest(prompt)
        if (found := self.registry.get(name)) is not None:
            return found, others
        if name not in self._automatic:
            task = asyncio.create_task(
                self._make(name, prompt, refinement_of(prompt, self.specializer, self.scheduler.rank), automatic=True)
            )
            self._automatic[name] = task
            task.add_done_callback(lambda done: self._automatic_done(name, done))
        # Shielded: a client that leaves takes nothing away from the others who wait.
        return await asyncio.shield(self._automatic[name]), others

    def _automatic_done(self, name: str, task: "asyncio.Task[Entry]") -> None:
        del self._automatic[name]
        if not task.cancelled():
            task.exception()  # looked at, even if all who waited have left

    async def create(self, request: NewSpecialization) -> Entry:
        """A new specialization."""
        try:
            prompt = requested_prompt(request)
        except DataError as error:
            raise api_error(error, error.field) from error
        refinement = refinement_of(prompt, self.specializer, self.scheduler.rank, request)
        name = request.name if request.name is not None else f"specialization-{secrets.token_hex(6)}"
        # Shielded: a specialization that was begun is finished and kept, whether its client waits or not.
        task = asyncio.ensure_future(self._make(name, prompt, refinement))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def _make(
        self, name: str, prompt: str | Prompt, refinement: RefineConfig | None, automatic: bool = False
    ) -> Entry:
        if self._waiting >= _MOST_WAITING:
            message = f"{_MOST_WAITING} prompts wait for the cloud model: try again later"
            raise ApiError(429, message, None, "queue_full", {"Retry-After": "1"})
        self.registry.reserve(name, automatic)
        self._waiting += 1
        directory = None if automatic else self.registry.directory(name)

        def make() -> Entry:
            (specialization,) = self.specializer.specialize([prompt], refine=refinement)
            entry = self.served.entry(name, specialization, automatic)
            if directory is not None:
                save_specialization(specialization, directory)
            return entry

        try:
            entry = await asyncio.get_running_loop().run_in_executor(self._thread, make)
        except LoraGenError as error:
            self.registry.release(name)
            raise api_error(error, "messages" if automatic else None) from error
        except BaseException:
            self.registry.release(name)
            raise
        finally:
            self._waiting -= 1
        self.registry.add(entry)
        return entry

    async def delete(self, name: str) -> None:
        """Forgets a specialization, and removes it from the store."""
        directory = None if self.entry(name).automatic else self.registry.directory(name)
        self._removing.add(name)
        try:
            if directory is not None:
                await asyncio.to_thread(remove_directory, directory)
            # Last: until then the name is taken, so that nobody puts another one in the directory's place.
            self.registry.remove(name)
        finally:
            self._removing.discard(name)

    def close(self) -> None:
        """Ends the thread, after what it does now."""
        self._thread.shutdown(wait=False, cancel_futures=True)


async def _tokenized(encode: Callable[[], Result], characters: int) -> Result:
    return encode() if characters < _LONG_TEXT else await asyncio.to_thread(encode)
