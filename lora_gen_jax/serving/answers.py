"""The sequences of one request, from the scheduler's thread to the event loop.

In: works, and stop strings. Out: pieces of text as they become final, each with its sequence's number. Whatever ends a
request early (a full queue, the time limit, a client that left) frees all of its rows.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.data.text_stream import TextStream
from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.inference.work import GenerationRequest
from lora_gen_jax.serving.errors import ApiError, api_error
from lora_gen_jax.serving.scheduler import Scheduler, Ticket, Tokens

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
