"""The HTTP API: one function for each endpoint.

FastAPI checks requests against ``requests.py``, and makes the OpenAPI document from these models and those of
``responses.py``. By then ``middleware.py`` has decided that the request may be made, and has read its body.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated, Any

import pydantic_core
from fastapi import APIRouter, Depends, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

import milora_jax
from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import Record
from milora_jax.errors import UserError
from milora_jax.serving import middleware, responses
from milora_jax.serving.answers import ChatWriter, CompletionWriter, GenerationResponse
from milora_jax.serving.api_errors import APIError, bad_request, model_not_found
from milora_jax.serving.backend import Backend
from milora_jax.serving.keys import Keyring, Tenant
from milora_jax.serving.registry import Registry
from milora_jax.serving.request_base import invalid_request
from milora_jax.serving.requests import AdapterRequest, ChatRequest, CompletionRequest
from milora_jax.serving.responses_api import NAMES, ResponseObject, ResponsesRequest, ResponsesWriter
from milora_jax.serving.tokenization import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)

log = logging.getLogger("milora_jax.serving")

PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"

PAGE_DIR = Path(__file__).parent / "page"
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""The files of the page for trying adapters, by path."""

PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

TEXT = {"schema": {"type": "string"}}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": TEXT}}}
METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": TEXT}}}

open_routes = APIRouter(responses=responses.ERRORS)
routes = APIRouter(
    # AccessControl has checked the key; this tells the OpenAPI document that there is one.
    dependencies=[Security(HTTPBearer(auto_error=False))],
    responses=responses.ERRORS,
)


# FastAPI runs plain functions in threads.
async def _service(request: Request) -> Backend:
    return request.app.state.service


async def _registry(request: Request) -> Registry:
    return request.app.state.registry


async def _tenant(request: Request) -> Tenant:
    return request.state.tenant


CurrentService = Annotated[Backend, Depends(_service)]
CurrentRegistry = Annotated[Registry, Depends(_registry)]
CurrentTenant = Annotated[Tenant, Depends(_tenant)]


def make_app(
    service: Backend, keys: Keyring, registry: Registry, hosts: frozenset[str] = frozenset()
) -> FastAPI:
    """Return the ASGI application.

    Args:
      keys: keys of tenants, administrators and monitors.
      registry: adapters that an administrator may load.
      hosts: names under which the server may be called; empty for any.
    """
    posts = {each.path for each in routes.routes if isinstance(each, APIRoute) and each.methods == {"POST"}}
    app = FastAPI(
        title="milora_jax",
        version=milora_jax.__version__,
        description="MiLoRA adapters on one frozen base, as OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(middleware.ErrorResponses, service),
            Middleware(middleware.AccessControl, service, keys, hosts),
            Middleware(middleware.RequestBody, service, frozenset(posts)),
        ],
    )
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _routing_error)
    app.state.service, app.state.registry = service, registry
    app.include_router(open_routes)
    app.include_router(routes)
    return app


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    """The error of FastAPI for a body, as OpenAI writes it."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    return middleware.error_response(invalid_request([{**each, "loc": each["loc"][1:]} for each in found]))


async def _routing_error(request: Request, error: Exception) -> JSONResponse:
    """The error of Starlette for a path or a method, as OpenAI writes it."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        return middleware.error_response(APIError(405, "This path has no such method."))
    return middleware.error_response(APIError(404, "There is no such path."))


@open_routes.get("/health/live")
async def live() -> responses.Liveness:
    """Report whether the process answers."""
    return responses.Liveness(status="alive")


@routes.get("/health/ready", responses={503: {"model": responses.Readiness, "description": "Not ready."}})
async def ready(service: CurrentService) -> responses.Readiness:
    """Report whether requests are served, and the number of free batch slots."""
    alive, free = await service.health()
    admission = service.admission
    is_ready = alive and not admission.closed
    body = responses.Readiness(
        status="ready" if is_ready else "not ready", free_slots=free, under_way=admission.active_requests
    )
    return JSONResponse(body.model_dump(), 200 if is_ready else 503)  # pyright: ignore[reportReturnType]


@routes.get(middleware.METRICS_PATH, response_class=JSONResponse, responses=METRICS)
async def metrics(service: CurrentService) -> Response:
    """Return counters in the format of Prometheus."""
    text = await service.metrics_text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@routes.get("/", include_in_schema=False)
@routes.get("/page.css", include_in_schema=False)
@routes.get("/page.js", include_in_schema=False)
async def page(request: Request) -> Response:
    """Return a file of the page for trying adapters."""
    name, media_type = PAGE[request.url.path]
    content = await asyncio.to_thread((PAGE_DIR / name).read_bytes)
    if name == "page.js":
        # The page writes an instruction as training did, so it is told the text around one.
        before, _, after = prompt_text(Record(PLACEHOLDER, "", "", "")).partition(PLACEHOLDER)
        content = b"const INSTRUCTION = " + pydantic_core.to_json([before, after]) + b";\n" + content
    return Response(content, headers=PAGE_HEADERS, media_type=media_type)


@routes.get("/v1/models")
async def models(service: CurrentService, tenant: CurrentTenant) -> responses.ModelList:
    """List the models that the caller may use."""
    return responses.ModelList(data=[responses.Model(id=name) for name in service.models(tenant)])


@routes.get("/v1/models/{model:path}")
async def model(model: str, service: CurrentService, tenant: CurrentTenant) -> responses.Model:
    """Return a model that the caller may use."""
    if model not in service.models(tenant):
        raise model_not_found(model)
    return responses.Model(id=model)


@routes.post("/v1/completions", response_model=responses.CompletionResponse, responses=STREAM)
async def completions(
    body: CompletionRequest, service: CurrentService, tenant: CurrentTenant
) -> GenerationResponse:
    """Continue one or several texts."""
    return GenerationResponse(service, tenant, body, lambda found: CompletionWriter(body, found, service))


@routes.post("/v1/chat/completions", response_model=responses.ChatResponse, responses=STREAM)
async def chat_completions(
    body: ChatRequest, service: CurrentService, tenant: CurrentTenant
) -> GenerationResponse:
    """Answer the messages of a chat."""
    return GenerationResponse(service, tenant, body, lambda found: ChatWriter(body, found, service))


@routes.post("/v1/responses", response_model=ResponseObject, responses=STREAM)
async def create_response(
    body: ResponsesRequest, service: CurrentService, tenant: CurrentTenant
) -> GenerationResponse:
    """Answer an input; nothing is stored."""
    chat = body.as_chat()
    return GenerationResponse(service, tenant, chat, lambda found: ResponsesWriter(body, found), NAMES)


@routes.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: CurrentService, tenant: CurrentTenant) -> TokenizeResponse:
    """Return the token ids of a prompt, as a generation would get it."""
    found = await service.tokenize(tenant, body)
    return TokenizeResponse(
        count=len(found.tokens),
        max_model_len=found.context,
        tokens=found.tokens,
        token_strs=found.strings,
    )


@routes.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest, service: CurrentService, tenant: CurrentTenant
) -> DetokenizeResponse:
    """Return the text of token ids."""
    return DetokenizeResponse(prompt=await service.detokenize(tenant, body))


@routes.post("/v1/load_lora_adapter")
async def load_lora_adapter(
    body: AdapterRequest, service: CurrentService, registry: CurrentRegistry
) -> responses.AdapterStatus:
    """Load a registered adapter."""
    name = body.lora_name
    registered = registry.get(name)
    if registered is None:
        raise APIError(404, f"No adapter is registered as {name!r}.", code="adapter_not_found")
    try:
        await service.load(name, registered)
        await asyncio.to_thread(registry.note, name, True)
    except (UserError, OSError) as error:
        log.warning("adapter %s was not loaded: %s", name, error)
        raise bad_request("The adapter cannot be loaded; the server's log says why.") from None
    return responses.AdapterStatus(status="loaded", lora_name=name)


@routes.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(
    body: AdapterRequest, service: CurrentService, registry: CurrentRegistry
) -> responses.AdapterStatus:
    """Unload an adapter; requests that use it complete."""
    name = body.lora_name
    if not await service.unload(name):
        raise APIError(404, f"No adapter is loaded as {name!r}.", code="adapter_not_found")
    await asyncio.to_thread(registry.note, name, False)
    return responses.AdapterStatus(status="unloaded", lora_name=name)
