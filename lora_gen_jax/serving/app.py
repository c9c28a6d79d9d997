"""The HTTP interface: OpenAI's completions and chats, endpoints for specializations, and the playground's page at /.

In: a `Service`; `page.html`, with its style and its script inside. Out: an ASGI application. Each request becomes works
of the scheduler, all of them or none; whatever ends it early frees their rows.
"""

import base64
import hashlib
import re
import time
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.serving.errors import ApiError, api_error, invalid
from lora_gen_jax.serving.guard import Guarded, Hosts
from lora_gen_jax.serving.registry import AUTO, BASE
from lora_gen_jax.serving.replies import Reply, answer, answer_length, check_count, in_time, make_works
from lora_gen_jax.serving.requests import Chat, Completion, NewSpecialization, as_turns, read_request
from lora_gen_jax.serving.service import Service
from lora_gen_jax.serving.web import Measured, check_key, error_response, read_body

_COMPLETION_TOKENS = 16  # of a completion that does not say how many, as OpenAI has it


def make_app(service: Service, hosts: Hosts | None = None, page: bool = True) -> FastAPI:
    """The application.

    Args:
        service: what it answers with; the caller starts and ends its scheduler.
        hosts: names that it answers to; left out, those of this machine's loopback.
        page: whether the playground is shown at /.
    """
    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="lora_gen_jax", openapi_url=None)
    app.include_router(_model_routes(service))
    app.include_router(_specialization_routes(service))
    app.include_router(_open_routes(service))
    if page:
        app.add_api_route("/", page_response, response_class=Response)
    app.add_middleware(Guarded, hosts=hosts or Hosts())
    app.add_middleware(Measured, service=service)

    @app.exception_handler(LoraGenError)
    async def known(request: Request, error: LoraGenError) -> Response:
        return error_response(api_error(error))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {str(error.detail).lower()}; docs/serving.md lists all"
        return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        # It is raised again afterwards, and logged with its traceback.
        return error_response(ApiError(500, "an error of the server; its log says more"))

    return app


def _keyed(service: Service) -> APIRouter:
    # Not a plain function, which would be called in a thread: that costs more than the check, and mixes the order up.
    async def check(request: Request) -> None:
        check_key(request, service.api_key)

    return APIRouter(prefix="/v1", dependencies=[Depends(check)])


def _model_routes(service: Service) -> APIRouter:
    router = _keyed(service)
    started = int(time.time())
    lasting = [BASE, AUTO] if service.chats else [BASE]

    def model(name: str, created: int) -> dict[str, Any]:
        # The model below, by its last name: its path on this machine stays private.
        root = PurePath(service.specializer.config.edge.source).name
        return {"id": name, "object": "model", "created": created, "owned_by": "lora_gen_jax", "root": root}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        named = [model(entry.name, entry.created) for entry in service.registry.entries]
        return {"object": "list", "data": [*(model(name, started) for name in lasting), *named]}

    @router.get("/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        return model(name, started if name in lasting else service.entry(name).created)

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        asked = read_request(Completion, await read_body(request, service.limits.body_bytes))
        special = service.special(asked.model)
        check_count(service, len(asked.prompt) * asked.n, "prompt")
        prompts = await service.prompt_ids(asked.prompt)
        works = []
        for ids in prompts:
            length = answer_length(service, ids, asked.max_tokens, "max_tokens", _COMPLETION_TOKENS)
            works += make_works(service, asked, ids, special, length)
        wants = asked.logprobs is not None
        reply = Reply("completion", asked.model, sum(map(len, prompts)), wants)
        return await answer(service, request, asked, works, reply)

    @router.post("/chat/completions")
    async def chat(request: Request) -> Response:
        asked = read_request(Chat, await read_body(request, service.limits.body_bytes))
        check_count(service, asked.n, "n")
        turns, model = as_turns(asked.messages), asked.model
        if not service.chats:
            # Said before the cloud model reads a system message.
            raise invalid("the edge model has no chat template: ask /v1/completions", "messages")
        if model == AUTO:
            special, turns = await in_time(service, request, service.automatic(turns, asked.turns_as_examples))
            model = special.name
        elif asked.turns_as_examples:
            raise invalid("turns_as_examples is for model auto: leave it out", "turns_as_examples")
        else:
            special = service.special(model)
        ids = await service.chat_ids(turns)
        field = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        works = make_works(service, asked, ids, special, answer_length(service, ids, asked.limit, field))
        return await answer(service, request, asked, works, Reply("chat", model, len(ids), asked.logprobs))

    return router


def _specialization_routes(service: Service) -> APIRouter:
    router = _keyed(service)

    @router.get("/specializations")
    async def specializations() -> dict[str, Any]:
        return {"object": "list", "data": [entry.body for entry in service.registry.entries]}

    @router.post("/specializations")
    async def create(request: Request) -> dict[str, Any]:
        asked = read_request(NewSpecialization, await read_body(request, service.limits.body_bytes))
        return (await in_time(service, request, service.create(asked))).body

    @router.get("/specializations/{name}")
    async def one_specialization(name: str) -> dict[str, Any]:
        return service.entry(name).details

    @router.delete("/specializations/{name}")
    async def delete(name: str) -> dict[str, Any]:
        await service.delete(name)
        return {"id": name, "object": "specialization.deleted", "deleted": True}

    return router


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        if service.healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "closing" if service.closing else "failed"}, 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


@cache
def page_text() -> str:
    """The page."""
    return (files("lora_gen_jax.serving") / "page.html").read_text(encoding="utf-8")


@cache
def page_policy() -> str:
    """The page's Content-Security-Policy: its own style and script, known by their hashes; requests to this server."""
    return (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hashes(tag: str) -> str:
    inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page_text(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in inside)


async def page_response() -> Response:
    """The page, with headers that keep it to itself."""
    headers = {
        "Content-Security-Policy": page_policy(),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    return Response(page_text(), media_type="text/html", headers=headers)
