"""The router's OpenAPI document: every path it serves, what it demands of a request, how errors look.

Generic on purpose and never wrong: bodies belong to the upstream's API, so only what the router itself reads
is said of them. Knows nothing about routes in force.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import orjson

_GENERATION = {
    "/v1/chat/completions": "OpenAI chat completions",
    "/v1/completions": "OpenAI completions",
    "/v1/responses": "OpenAI responses",
    "/v1/messages": "Anthropic messages",
}
_WHOLE = {
    "/v1/messages/count_tokens": "Anthropic token counting",
    "/v1/embeddings": "OpenAI embeddings",
    "/v1/score": "Scores of pairs of texts",
    "/score": "Scores of pairs of texts",
    "/v1/rerank": "Documents by relevance",
    "/rerank": "Documents by relevance",
    "/pooling": "Pooled hidden states",
    "/classify": "Classification",
    "/tokenize": "Tokens of a text or of messages",
    "/detokenize": "The text of tokens",
}
ROUTED = frozenset((*_GENERATION, *_WHOLE))
"""Paths passed to upstreams: a fixed list, so that no client can reach an upstream's other doors."""
FEEDBACK = "/v1/feedback"

_TEXT = {"type": "string"}
_NULLABLE_TEXT = {"type": ["string", "null"]}
_SCHEMAS: dict[str, Any] = {
    "Request": {
        "type": "object",
        "description": "The upstream's own request. All fields but `model` reach it as they are.",
        "properties": {"model": {**_TEXT, "minLength": 1, "description": "The name of a route."}},
        "required": ["model"],
        "additionalProperties": True,
    },
    "Answer": {"type": ["object", "array"], "description": "The upstream's answer, as it is."},
    "Error": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": _NULLABLE_TEXT,
                    "code": {"type": ["string", "integer", "null"]},
                },
                "required": ["message"],
            }
        },
        "required": ["error"],
    },
    "AnthropicError": {
        "type": "object",
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "properties": {"type": _TEXT, "message": _TEXT},
                "required": ["type", "message"],
            },
        },
        "required": ["type", "error"],
    },
    "Model": {
        "type": "object",
        "properties": {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": _TEXT,
        },
        "required": ["id", "object", "created", "owned_by"],
    },
    "Models": {
        "type": "object",
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
        },
        "required": ["object", "data"],
    },
    "Health": {
        "type": "object",
        "properties": {"status": {"const": "ok"}, "replica": _TEXT},
        "required": ["status", "replica"],
    },
    "Targets": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "targets": {"type": "array", "items": _TEXT},
                "labels": {"type": "object", "additionalProperties": _TEXT},
            },
            "required": ["targets", "labels"],
        },
    },
    "Readiness": {
        "type": "object",
        "properties": {
            "status": {"enum": ["ready", "not ready"]},
            "missing": {"type": "array", "items": _TEXT},
        },
        "required": ["status", "missing"],
    },
    "Feedback": {
        "type": "object",
        "description": "What a user says of an answer; at least one of good, score, comment and correction.",
        "properties": {
            "request_id": {**_TEXT, "minLength": 1, "maxLength": 128, "description": "Its x-request-id."},
            "id": {**_TEXT, "description": "The same id twice is one judgement. Default: the request's id."},
            "good": {"type": ["boolean", "null"]},
            "score": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
            "comment": _NULLABLE_TEXT,
            "correction": _NULLABLE_TEXT,
        },
        "required": ["request_id"],
    },
    "FeedbackStored": {
        "type": "object",
        "properties": {"object": {"const": "feedback"}, "id": _TEXT, "request_id": _TEXT, "status": _TEXT},
        "required": ["object", "id", "request_id", "status"],
    },
}
_ANSWER_HEADERS = {
    "x-request-id": "The request's id, in the log too; a client may choose it.",
    "x-stillhouse-arm": "The arm that the request was assigned to.",
    "x-stillhouse-model": "The model that answered.",
    "x-stillhouse-split": "The version of the split that was in force.",
}
_REQUEST_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "x-request-id": ("An id of the client's choice; anything else is replaced.", _TEXT),
    "x-stillhouse-arm": (
        "Ask for an arm, for tests; never counted as evidence. Refused while the route has no such arm.",
        {"enum": ["stable", "canary"]},
    ),
}


@cache
def document() -> bytes:
    """The document as JSON."""
    paths = {path: {"post": _routed(path, title)} for path, title in (_GENERATION | _WHOLE).items()}
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Stillhouse router",
                "version": "1",
                "description": "Models are routes. Requests are passed to a route's upstreams whole.",
            },
            "paths": {**paths, FEEDBACK: {"post": _feedback()}, **_local_paths()},
            "components": {"schemas": _SCHEMAS},
        }
    )


def _routed(path: str, title: str) -> dict[str, Any]:
    content = _json("Answer")
    if path in _GENERATION:
        content["text/event-stream"] = {}  # OpenAPI 3.1 has no words for events
    headers = {name: {"description": why, "schema": _TEXT} for name, why in _ANSWER_HEADERS.items()}
    error = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    return {
        "summary": title,
        "operationId": path.strip("/").replace("/", "_"),
        "parameters": [
            {"name": name, "in": "header", "required": False, "description": why, "schema": schema}
            for name, (why, schema) in _REQUEST_HEADERS.items()
        ],
        "requestBody": {"required": True, "content": _json("Request")},
        "responses": {
            "200": {"description": "The upstream's answer.", "headers": headers, "content": content},
            "default": {"description": "Refused, or nobody could answer.", "content": _json(error)},
        },
    }


def _feedback() -> dict[str, Any]:
    return {
        "summary": "Feedback on an answer",
        "operationId": "feedback",
        "requestBody": {"required": True, "content": _json("Feedback")},
        "responses": {
            "200": {"description": "Stored.", "content": _json("FeedbackStored")},
            "default": {"description": "Refused, or not stored.", "content": _json("Error")},
        },
    }


def _local_paths() -> dict[str, Any]:
    name = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    missing = {"404": {"description": "There is no such route.", "content": _json("Error")}}
    metrics = {"text/plain": {"schema": {"type": "string"}}}
    refused = {"default": {"description": "Refused.", "content": _json("Error")}}
    return {
        "/v1/models": {"get": _get("The routes", "models", _json("Models"))},
        "/v1/models/{model}": {
            "get": {**_get("One route", "model", _json("Model"), missing), "parameters": [name]}
        },
        "/health": {"get": _get("The process lives", "health", _json("Health"))},
        "/ready": {
            "get": _get(
                "The router can answer, or what is missing",
                "ready",
                _json("Readiness"),
                {"503": {"description": "Not ready.", "content": _json("Readiness")}},
            )
        },
        "/metrics": {"get": _get("Prometheus metrics", "metrics", metrics)},
        "/targets": {
            "get": _get("Engines, for Prometheus' http_sd_configs", "targets", _json("Targets"), refused)
        },
        "/openapi.json": {
            "get": _get("This document", "openapi", {"application/json": {"schema": {"type": "object"}}})
        },
    }


def _get(
    title: str, operation: str, content: dict[str, Any], more: dict[str, Any] | None = None
) -> dict[str, Any]:
    responses = {"200": {"description": title, "content": content}, **(more or {})}
    return {"summary": title, "operationId": operation, "responses": responses}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
