"""What the server says of itself: an OpenAPI 3.1 document, made from the same models that check requests."""

from __future__ import annotations

import functools
from typing import Any

from pydantic.json_schema import models_json_schema

import milora_jax
from milora_jax.serving.schema import Chat, Completion, NamedAdapter

REFERENCE = "#/components/schemas/{model}"

REFUSALS = {
    "400": "The request is not as described, or not served.",
    "401": "No key, or a wrong one.",
    "403": "The key may not make this call.",
    "404": "There is no such model, adapter or path.",
    "405": "The path has no such method.",
    "408": "The body took too long.",
    "413": "The body is too long.",
    "415": "The body is no JSON by its headers.",
    "429": "A limit of the tenant's own is reached.",
    "431": "The head is too long.",
    "500": "An error of the server's.",
    "503": "The server is overloaded, or stops.",
}

REFUSALS_OF_HEADS = ("400", "401", "403", "429", "431")
"""Those of a request without a body."""

NULLABLE_TEXT = {"type": ["string", "null"]}

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": NULLABLE_TEXT,
                "code": NULLABLE_TEXT,
            },
        }
    },
}

COUNT = {"type": "integer", "minimum": 0}

USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
}

ROUTE: dict[str, Any] = {
    "type": "object",
    "description": "Routing weights of the prompt, layers by experts.",
    "required": ["experts", "route"],
    "properties": {
        "experts": {"type": "array", "items": {"type": "string"}},
        "route": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    },
}


@functools.cache
def document() -> dict[str, Any]:
    """The document."""
    bodies = (Completion, Chat, NamedAdapter)
    _, found = models_json_schema([(model, "validation") for model in bodies], ref_template=REFERENCE)
    text = {"type": "string"}
    said = {"type": "object", "required": ["role", "content"], "properties": {"role": text, "content": text}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "milora_jax",
            "version": milora_jax.__version__,
            "description": "MiLoRA adapters on one frozen base, as OpenAI's API.",
        },
        "security": [{"key": []}],
        "paths": {
            "/health/live": _get("Whether the process answers.", _state(), open_to_all=True),
            "/health/ready": _get("Whether requests are served.", _state(), "503"),
            "/metrics": _get("Counters in Prometheus' format.", {"type": "string"}, kind="text/plain"),
            "/v1/models": _get("The caller's own models.", _models()),
            "/v1/completions": _post("Continue a text.", "Completion", _answer("text", text)),
            "/v1/chat/completions": _post("Answer messages.", "Chat", _answer("message", said)),
            "/v1/load_lora_adapter": _post("Offer a registered adapter.", "NamedAdapter", _named()),
            "/v1/unload_lora_adapter": _post("Offer an adapter no more.", "NamedAdapter", _named()),
        },
        "components": {
            "schemas": {**found["$defs"], "Error": ERROR, "Usage": USAGE, "Route": ROUTE},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _get(
    summary: str,
    schema: dict[str, Any],
    *more: str,
    kind: str = "application/json",
    open_to_all: bool = False,
) -> dict[str, Any]:
    refusals = {status: text for status, text in _refusals().items() if status in REFUSALS_OF_HEADS}
    others = {status: _content(summary, schema) for status in more}
    good = {"200": _content(summary, schema, kind)}
    operation: dict[str, Any] = {"summary": summary, "responses": {**good, **refusals, **others}}
    if open_to_all:
        operation["security"] = []
    return {"get": operation}


def _post(summary: str, body: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=body)}}}
    good = _content(summary, schema)
    if body != "NamedAdapter":
        good["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": content},
            "responses": {"200": good, **_refusals()},
        }
    }


def _refusals() -> dict[str, Any]:
    error = {"$ref": REFERENCE.format(model="Error")}
    found = {status: _content(text, error) for status, text in REFUSALS.items()}
    for status in ("429", "503"):
        found[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return found


def _content(text: str, schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {"description": text, "content": {kind: {"schema": schema}}}


def _state() -> dict[str, Any]:
    properties = {"status": {"type": "string"}, "free_slots": COUNT, "under_way": COUNT}
    return {"type": "object", "required": ["status"], "properties": properties}


def _models() -> dict[str, Any]:
    text = {"type": "string"}
    model = {
        "type": "object",
        "required": ["id", "object", "created", "owned_by"],
        "properties": {"id": text, "object": text, "created": {"type": "integer"}, "owned_by": text},
    }
    properties = {"object": text, "data": {"type": "array", "items": model}}
    return {"type": "object", "required": ["object", "data"], "properties": properties}


def _named() -> dict[str, Any]:
    text = {"type": "string"}
    properties = {"status": text, "lora_name": text}
    return {"type": "object", "required": ["status", "lora_name"], "properties": properties}


def _answer(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "string"}
    choice = {
        "type": "object",
        "required": ["index", field, "logprobs", "finish_reason"],
        "properties": {
            "index": COUNT,
            field: schema,
            "logprobs": {"type": ["object", "null"]},
            "finish_reason": {"enum": ["stop", "length"]},
        },
    }
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": text,
            "object": text,
            "created": {"type": "integer"},
            "model": text,
            "choices": {"type": "array", "minItems": 1, "items": choice},
            "usage": {"$ref": REFERENCE.format(model="Usage")},
            "milora": {"$ref": REFERENCE.format(model="Route")},
        },
    }
