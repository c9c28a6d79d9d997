"""One request for text: how long it may be, its works, and the answer that comes of them.

In: checked requests, token ids and specializations. Out: works; an answer as a whole, or as server-sent events.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lora_gen_jax.inference.work import Work
from lora_gen_jax.serving.answers import Answering
from lora_gen_jax.serving.errors import invalid, too_late
from lora_gen_jax.serving.registry import Entry
from lora_gen_jax.serving.replies import Choice, Reply
from lora_gen_jax.serving.schemas import Sampled
from lora_gen_jax.serving.service import Service
from lora_gen_jax.serving.web import Events, seconds_since_start, watched

_SEEDS = 2**31


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

    Raises:
        ApiError: 400 when it is more than the limit, or more than the context has room for.
    """
    longest, most = service.scheduler.longest, service.limits.max_new_tokens
    if asked is not None and asked > most:
        raise invalid(f"{field} is {asked}, the limit is {most}: lower it", field)
    if len(ids) + (asked or 1) > longest:
        more = f" and {field} is {asked}" if asked else ""
        message = f"the prompt has {len(ids)} tokens{more}, the limit of both is {longest}: shorten it"
        raise invalid(message, None, "context_length_exceeded")
    return min(otherwise or most, most, longest - len(ids)) if asked is None else asked


def make_works(service: Service, asked: Sampled, ids: list[int], special: Entry | None, length: int) -> list[Work]:
    """The n works of one prompt; each draws with a seed of its own."""
    seed = secrets.randbelow(_SEEDS) if asked.seed is None else asked.seed
    return [
        Work(
            ids=tuple(ids),
            max_new_tokens=length,
            gates_LE=None if special is None else special.gates_LE,
            factors={} if special is None else special.factors,
            stop_ids=service.stop_ids,
            temperature=asked.temperature,
            top_k=max(0, asked.top_k),
            top_p=asked.top_p,
            seed=(seed + choice) % _SEEDS,
        )
        for choice in range(asked.n)
    ]


async def in_time(service: Service, request: Request, made: Any) -> Any:
    """Waits for a specialization no longer than for an answer.

    Raises:
        ApiError: 504.
    """
    seconds = service.limits.timeout
    try:
        return await asyncio.wait_for(made, max(0.0, seconds - seconds_since_start(request)))
    except TimeoutError:
        raise too_late(seconds) from None


async def answer(service: Service, request: Request, asked: Sampled, works: list[Work], reply: Reply) -> Response:
    """Submits the works of a request, and tells what comes of them: whole, or piece by piece."""
    loop, seconds = asyncio.get_running_loop(), service.limits.timeout
    deadline = loop.time() + max(0.0, seconds - seconds_since_start(request))
    answering = Answering(service.scheduler, service.encoder, works, asked.stop, reply.logprobs)
    timer = loop.call_at(deadline, answering.fail, too_late(seconds))

    def end() -> None:
        timer.cancel()
        service.metrics.cancelled.inc(answering.cancel())

    if asked.stream:
        events = _events(service, request, answering, reply, asked.stream_options.include_usage)
        return Events(events, deadline, answering.leave, end)
    try:
        async with watched(request.receive, answering.leave):
            choices = [Choice() for _ in works]
            async for piece in _timed(service, request, answering):
                choices[piece.index].add(piece)
        return JSONResponse(reply.whole(choices, answering.generated))
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
