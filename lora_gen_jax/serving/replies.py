"""One request for text: its works, and the answer that comes of them in OpenAI's JSON, whole or in chunks.

In: checked requests, token ids and specializations. Out: works; pieces of text as they become final, from the
scheduler's thread to the event loop; an answer as a whole, or as server-sent events. Whatever ends a request early (a
full queue, the time limit, a client that left) frees all of its rows.
"""

import asyncio
import contextlib
import itertools
import math
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.data.text_stream import TextStream
from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.inference.decode import GenerationSettings
from lora_gen_jax.inference.sampling import Sampling
from lora_gen_jax.inference.work import GenerationRequest
from lora_gen_jax.serving.errors import ApiError, api_error, invalid, too_late
from lora_gen_jax.serving.registry import Entry
from lora_gen_jax.serving.requests import Sampled
from lora_gen_jax.serving.scheduler import Scheduler, Ticket, Tokens
from lora_gen_jax.serving.service import Service
from lora_gen_jax.serving.web import Events, limited, seconds_since_start

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Token(NamedTuple):
    """A token as clients see it: its own text, its log-probability, and where it begins in the answer."""

    text: str
    logprob: float
    offset: int


class Piece(NamedTuple):
    """What is new of one sequence.

    Attributes:
        index: of the sequence in its request.
        text: that is final; "" where nothing is yet.
        tokens: new ones, if they were asked for.
        finish: "stop" or "length" with the last piece.
    """

    index: int
    text: str
    tokens: list[Token]
    finish: Literal["stop", "length"] | None


@dataclass
class _Sequence:
    text: TextStream
    ticket: Ticket
    count: int = 0
    finished: bool = False
    tokens: list[Token] = field(default_factory=list)


class Answering:
    """The sequences of one request.

    Args:
        scheduler: that generates them.
        encoder: of the edge model.
        works: one a sequence.
        stop: texts that end a sequence before them.
        with_tokens: whether pieces name their tokens.

    Attributes:
        generated: new tokens so far, over all sequences.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        encoder: Encoder,
        works: Sequence[GenerationRequest],
        stop: tuple[str, ...] = (),
        with_tokens: bool = False,
    ):
        self._encoder, self._with_tokens = encoder, with_tokens
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Tokens]] = asyncio.Queue()
        try:
            tickets = scheduler.submit_all(works, [self._listener(index) for index in range(len(works))])
        except LoraGenError as error:
            raise api_error(error) from error
        # What listeners were told meanwhile waits for the event loop.
        self._sequences = [_Sequence(TextStream(encoder, stop), ticket) for ticket in tickets]

    @property
    def generated(self) -> int:
        return sum(sequence.count for sequence in self._sequences)

    @property
    def count(self) -> int:
        """Sequences."""
        return len(self._sequences)

    def _listener(self, index: int) -> Callable[[Tokens], None]:
        def listen(tokens: Tokens) -> None:
            with contextlib.suppress(RuntimeError):  # when the server has ended, and its loop with it
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, tokens))

        return listen

    async def pieces(self) -> AsyncIterator[Piece]:
        """What becomes final, until every sequence has ended."""
        while not all(sequence.finished for sequence in self._sequences):
            index, tokens = await self._events.get()
            if not self._sequences[index].finished:
                yield self._piece(index, tokens)

    def cancel(self) -> int:
        """Frees the rows of all unfinished sequences; returns how many there were."""
        unfinished = [sequence for sequence in self._sequences if not sequence.finished]
        for sequence in unfinished:
            sequence.finished = True
            sequence.ticket.cancel()
        return len(unfinished)

    def _piece(self, index: int, tokens: Tokens) -> Piece:
        sequence = self._sequences[index]
        said = []
        for id, logprob in zip(tokens.ids, tokens.logprobs, strict=True):
            # One by one: a stop string leaves out what was generated after it.
            offset = sequence.text.length
            said.append(sequence.text.push([id]))
            sequence.count += 1
            if self._with_tokens:
                logprob = logprob if math.isfinite(logprob) else _LEAST_LOGPROB
                sequence.tokens.append(Token(self._encoder.tokenizer.decode([id]), logprob, offset))
            if sequence.text.stopped:
                break
        finish = "stop" if sequence.text.stopped else tokens.finish
        if finish in ("cancelled", "failed"):
            sequence.finished = True
            raise _given_up(finish)
        if finish is not None:
            said.append(sequence.text.finish())
            finish = "stop" if sequence.text.stopped else finish
            sequence.finished = True
            if tokens.finish is None:
                sequence.ticket.cancel()
        return Piece(index, "".join(said), self._final_tokens(sequence), finish)

    def _final_tokens(self, sequence: _Sequence) -> list[Token]:
        """Tokens that are told now: their text was; those of a stop string never are."""
        if sequence.finished and not sequence.text.stopped:
            known, sequence.tokens = sequence.tokens, []
            return known
        final = [token for token in sequence.tokens if token.offset < sequence.text.final]
        del sequence.tokens[: len(final)]
        return final


def _given_up(finish: str) -> ApiError:
    if finish == "cancelled":
        return ApiError(503, "the server is closing and had no time left for this answer", None, "closing")
    return ApiError(500, "generating the answer failed; the server's log says why", None, "generation_failed")


_SEEDS = 2**31


@dataclass(frozen=True)
class Reply:
    """The head that an answer and all of its chunks share.

    Attributes:
        kind: of the request.
        model: that answers.
        prompt_tokens: of all prompts, each counted once.
        logprobs: whether they were asked for.
    """

    kind: Literal["completion", "chat"]
    model: str
    prompt_tokens: int
    logprobs: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self, generated: int) -> dict[str, int]:
        """Tokens read and written."""
        read = self.prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}

    def whole(self, pieces: Iterable[Piece], generated: int) -> dict[str, Any]:
        """An answer that is not streamed, from all of its pieces."""
        index_of = attrgetter("index")
        choices = []
        for index, group in itertools.groupby(sorted(pieces, key=index_of), index_of):
            own = list(group)
            text, tokens = "".join(piece.text for piece in own), [token for piece in own for token in piece.tokens]
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if self.kind == "chat" else {"text": text}
            choices.append(self._choice(index, tokens, own[-1].finish, said))
        return self._head(choices) | {"usage": self.usage(generated)}

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        """What a stream begins with: in a chat, whose turn it is."""
        if self.kind == "completion":
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._head([self._choice(index, [], None, said)], ".chunk") for index in range(count)]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One piece of a stream."""
        delta = {"content": piece.text} if piece.text else {}
        said = {"delta": delta} if self.kind == "chat" else {"text": piece.text}
        return self._head([self._choice(piece.index, piece.tokens, piece.finish, said)], ".chunk")

    def last_chunk(self, generated: int) -> dict[str, Any]:
        """The one with the usage, if it was asked for."""
        return self._head([], ".chunk") | {"usage": self.usage(generated)}

    def _head(self, choices: list[dict[str, Any]], streamed: str = "") -> dict[str, Any]:
        kind = ("cmpl", "text_completion") if self.kind == "completion" else ("chatcmpl", f"chat.completion{streamed}")
        head = {"id": f"{kind[0]}-{self.id}", "object": kind[1], "created": self.created, "model": self.model}
        return head | {"choices": choices}

    def _choice(self, index: int, tokens: Sequence[Token], finish: str | None, said: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "logprobs": self._logprobs(tokens), "finish_reason": finish, **said}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Of the chosen tokens; other tokens' are not kept."""
        if not self.logprobs or not tokens:
            return None
        if self.kind == "completion":
            return {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": None,
                "text_offset": [token.offset for token in tokens],
            }
        content = [{"token": t.text, "logprob": t.logprob, "bytes": _bytes(t.text), "top_logprobs": []} for t in tokens]
        return {"content": content, "refusal": None}


def _bytes(text: str) -> list[int] | None:
    """A token's bytes; None where it is a part of a character, whose own bytes its text does not tell."""
    return None if "\ufffd" in text else list(text.encode())


def check_count(service: Service, count: int, param: str) -> None:
    """Raises ApiError (400) for more answers than one request may ask for."""
    if count > service.limits.sequences:
        most = service.limits.sequences
        raise invalid(f"the request asks for {count} answers, the limit is {most}: send several requests", param)


def answer_length(service: Service, ids: list[int], asked: int | None, field: str, otherwise: int | None = None) -> int:
    """New tokens at most: as the request says, else as many as the limit and the model's context allow.

    Args:
        service: with the limits.
        ids: of the prompt.
        asked: by the request.
        field: that says so, or would.
        otherwise: no more than this where the request says nothing.
    """
    longest, most = service.scheduler.longest, service.limits.max_new_tokens
    if asked is not None and asked > most:
        raise invalid(f"{field} is {asked}, the limit is {most}: lower it", field)
    if len(ids) + (asked or 1) > longest:
        more = f" and {field} is {asked}" if asked else ""
        message = f"the prompt has {len(ids)} tokens{more}, the limit of both is {longest}: shorten it"
        raise invalid(message, None, "context_length_exceeded")
    return min(otherwise or most, most, longest - len(ids)) if asked is None else asked


def make_works(
    service: Service, asked: Sampled, ids: list[int], special: Entry | None, length: int
) -> list[GenerationRequest]:
    """The n works of one prompt; each draws with a seed of its own."""
    seed = secrets.randbelow(_SEEDS) if asked.seed is None else asked.seed
    sampling = Sampling(asked.temperature, max(0, asked.top_k), asked.top_p)
    return [
        GenerationRequest(
            ids=tuple(ids),
            settings=GenerationSettings(length, service.stop_ids, sampling, (seed + choice) % _SEEDS),
            gates=None if special is None else special.gates,
            factors={} if special is None else special.made.factors,
        )
        for choice in range(asked.n)
    ]


async def in_time(service: Service, request: Request, made: Any) -> Any:
    """Waits for a specialization no longer than for an answer."""
    seconds = service.limits.timeout
    try:
        return await asyncio.wait_for(made, max(0.0, seconds - seconds_since_start(request)))
    except TimeoutError:
        raise too_late(seconds) from None


async def answer(
    service: Service, request: Request, asked: Sampled, works: list[GenerationRequest], reply: Reply
) -> Response:
    """Submits the works of a request, and tells what comes of them: whole, or piece by piece."""
    loop, seconds = asyncio.get_running_loop(), service.limits.timeout
    deadline = loop.time() + max(0.0, seconds - seconds_since_start(request))
    late = too_late(seconds)
    answering = Answering(service.scheduler, service.encoder, works, asked.stop, reply.logprobs)

    def end() -> None:
        service.metrics.cancelled.inc(answering.cancel())

    if asked.stream:
        events = _events(service, request, answering, reply, asked.stream_options.include_usage)
        return Events(events, deadline, late, end)
    try:
        async with limited(request.receive, deadline, late):
            pieces = [piece async for piece in _timed(service, request, answering)]
        return JSONResponse(reply.whole(pieces, answering.generated))
    finally:
        end()


async def _events(
    service: Service, request: Request, answering: Answering, reply: Reply, usage: bool
) -> AsyncIterator[dict[str, Any]]:
    for chunk in reply.first_chunks(answering.count):
        yield chunk
    async for piece in _timed(service, request, answering):
        if piece.text or piece.tokens or piece.finish:
            yield reply.chunk(piece)
    if usage:
        yield reply.last_chunk(answering.generated)


async def _timed(service: Service, request: Request, answering: Answering) -> AsyncIterator[Any]:
    """The pieces; the first one's time is noted."""
    first = True
    async for piece in answering.pieces():
        if first:
            service.metrics.first_token.observe(seconds_since_start(request))
            first = False
        yield piece
