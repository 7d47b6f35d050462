"""The OpenAPI 3.1 document, from the same table that the routes come from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from guestpass._version import VERSION

REF = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `handler` is the name of the method of `Api` that answers."""

    method: str
    path: str  # below /api/v1, aiohttp's and OpenAPI's syntax: {name}
    handler: str
    summary: str
    answer: type[BaseModel] | None = None  # JSON
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    status: int = 200
    needs_key: bool = True
    others: Sequence[str] = ()  # further media types of the answer
    idempotency_key: bool = False


def document(operations: Sequence[Operation], problem: type[BaseModel], prefix: str) -> dict[str, Any]:
    taken = {o.body for o in operations} | {o.query for o in operations}
    given = {o.answer for o in operations} | {problem}
    schemas, definitions = models_json_schema(
        [(m, "validation") for m in sorted(filter(None, taken), key=lambda m: m.__name__)]
        + [(m, "serialization") for m in sorted(filter(None, given), key=lambda m: m.__name__)],
        ref_template=REF,
    )
    components = definitions.get("$defs", {})
    queries = {o.query.__name__: components[o.query.__name__] for o in operations if o.query is not None}
    refs = {(model, mode): schema for (model, mode), schema in schemas.items()}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described: dict[str, Any] = {
            "operationId": operation.handler,
            "summary": operation.summary,
            "parameters": _parameters(operation, queries),
            "responses": {
                str(operation.status): _answer(operation, refs),
                "default": {
                    "description": "What went wrong",
                    "content": {"application/problem+json": {"schema": refs[problem, "serialization"]}},
                },
            },
        }
        if operation.body is not None:
            described["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": refs[operation.body, "validation"]}},
            }
        if not operation.needs_key:
            described["security"] = []
        paths.setdefault(prefix + operation.path, {})[operation.method.lower()] = described
    for name in queries:
        del components[name]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Guestpass management API", "version": VERSION},
        "security": [{"apiKey": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}},
        },
    }


def _answer(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {media: {} for media in operation.others}
    if operation.answer is not None:
        content["application/json"] = {"schema": refs[operation.answer, "serialization"]}
    return {"description": HTTPStatus(operation.status).phrase, "content": content}


def _parameters(operation: Operation, queries: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    if operation.query is not None:
        schema = queries[operation.query.__name__]
        required = schema.get("required", [])
        found += [
            {"name": name, "in": "query", "required": name in required, "schema": described}
            for name, described in schema["properties"].items()
        ]
    if operation.idempotency_key:
        found.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "maxLength": 255},
                "description": "The same request with the same key creates nothing a second time (for 24 hours).",
            }
        )
    return found
