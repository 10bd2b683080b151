"""The OpenAPI document: what FastAPI finds in the routes, with the problems, keys and links that it can't know."""

from typing import Any

from fastapi import FastAPI

from backcast.api import auth, problems
from backcast.errors import (
    BackcastError,
    BodyTooLarge,
    ForeignHost,
    ForeignOrigin,
    InvalidInput,
    MalformedBody,
    MethodNotAllowed,
    ReadOnlyKey,
    RequestTooSlow,
    Unauthorized,
    UnsupportedBody,
)

Document = dict[str, Any]

_ALWAYS = (ForeignHost, ForeignOrigin, MethodNotAllowed, InvalidInput, BackcastError)
_OF_A_BODY = (MalformedBody, RequestTooSlow, BodyTooLarge, UnsupportedBody)
_LINKS = {
    "run_id": (
        "/v1/runs/{run_id}",
        "/v1/runs/{run_id}/input",
        "/v1/runs/{run_id}/result",
        "/v1/runs/{run_id}/events",
        "/v1/runs/{run_id}/logs",
        "/v1/runs/{run_id}/cancel",
        "/v1/runs/{run_id}/retry",
        "/v1/runs/{run_id}/attempts",
        "/v1/runs/{run_id}/why",
        "/tasks/{run_id}/status",
    ),
    "operation_id": ("/v1/operations/{operation_id}", "/v1/operations/{operation_id}/cancel"),
    "batch_id": (
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/results",
        "/v1/batches/{batch_id}/events",
        "/v1/batches/{batch_id}/cancel",
        "/v1/batches/{batch_id}/retry",
    ),
}
_MAKES = {
    "/v1/tasks/{name}/runs": ("run_id", "id"),
    "/tasks": ("run_id", "task_run_id"),
    "/v1/batches": ("batch_id", "id"),
    "/v1/runs/retry": ("operation_id", "id"),
    "/v1/runs/cancel": ("operation_id", "id"),
    "/v1/batches/{batch_id}/retry": ("operation_id", "id"),
}
"""The routes that make something: the parameter by which others find it, and the field of the answer that has it."""


def describe(app: FastAPI) -> None:
    """Let the application's OpenAPI document state all this."""
    plain = app.openapi

    def openapi() -> Document:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(plain())
        return app.openapi_schema

    app.openapi = openapi


def _complete(document: Document) -> Document:
    components = document["components"]
    components["schemas"] |= problems.schemas()
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            kinds = _ALWAYS if auth.is_open(path) else (*_ALWAYS, Unauthorized)
            kinds += () if auth.is_open(path) or method.upper() in auth.READING else (ReadOnlyKey,)
            kinds += _OF_A_BODY if "requestBody" in operation else ()
            stated: Document = operation["responses"]
            if "HTTPValidationError" in str(stated.get("422")):  # FastAPI's own
                del stated["422"]
            general = {str(status): found for status, found in problems.responses(*kinds).items()}
            operation["responses"] = dict(sorted((general | stated).items()))
    for path, (parameter, field) in _MAKES.items():
        links = {
            operation["operationId"]: {
                "operationId": operation["operationId"],
                "parameters": {parameter: f"$response.body#/{field}"},
            }
            for place in _LINKS[parameter]
            for operation in document["paths"][place].values()
        }
        for status in ("200", "202"):
            if status in (responses := document["paths"][path]["post"]["responses"]):
                responses[status]["links"] = links
    return document
