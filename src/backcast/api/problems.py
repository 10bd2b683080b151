"""Turns every error into a problem document (RFC 9457): `type` is a link that explains it, `code` is stable, `detail`
explains what to do, `errors` names each wrong field by JSON pointer.
"""

import inspect
import json
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from backcast.api.prefix import of_links
from backcast.api.routing import Route
from backcast.errors import (
    BackcastError,
    ClientError,
    FieldError,
    InvalidInput,
    NotFinished,
    NotFound,
    RunError,
    TooManyWaiting,
    Unauthorized,
    Unavailable,
    UnknownBatch,
    UnknownRun,
)

log = logging.getLogger("backcast.api")
MEDIA_TYPE = "application/problem+json"
EVERY = 10.0
"""Seconds between two lines in the log about one service that is away."""


class ProblemField(BaseModel):
    pointer: str
    detail: str


class ProblemDocument(BaseModel):
    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[ProblemField] = []


def document(status: int, code: str, title: str, detail: str, errors: tuple[FieldError, ...] = ()) -> dict[str, Any]:
    body: dict[str, Any] = {
        "type": f"{of_links.get()}/problems/{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
    }
    if errors:
        body["errors"] = [{"pointer": error.pointer, "detail": error.detail} for error in errors]
    return body


def respond(error: BackcastError) -> Response:
    errors = error.errors if isinstance(error, ClientError) else ()
    headers: dict[str, str] = {}
    if isinstance(error, Unavailable | NotFinished | TooManyWaiting):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after.total_seconds())))
    elif isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    body = document(error.status, error.code, error.title, error.detail, errors)
    # Escaped: a sentence may quote the caller's input, lone surrogates included.
    return Response(json.dumps(body), error.status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """The one place where errors become responses."""
    reported = dict[type[Unavailable], float]()

    @app.exception_handler(BackcastError)
    async def ours(request: Request, error: BackcastError) -> Response:  # pyright: ignore[reportUnusedFunction]
        if isinstance(error, Unavailable):
            if time.monotonic() - reported.get(type(error), -EVERY) >= EVERY:
                reported[type(error)] = time.monotonic()
                log.warning("answering 503: %s", error)  # with the reason, which the caller does not see
        elif error.status >= 500:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:  # pyright: ignore[reportUnusedFunction]
        fields = error.errors()
        if fields[0]["loc"][:2] == ("path", "run_id"):
            return respond(UnknownRun("A run id is a UUID: use the one that the submission returned."))
        if fields[0]["loc"][:2] == ("path", "batch_id"):
            return respond(UnknownBatch("A batch id is a UUID: use the one that the submission returned."))
        where = tuple(FieldError("/".join(map(str, field["loc"])), field["msg"]) for field in fields)
        return respond(InvalidInput(f"{where[0].pointer}: {where[0].detail}.", errors=where))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:  # pyright: ignore[reportUnusedFunction]
        if error.status_code == 404:
            return respond(NotFound(f"There is no {request.scope['path']} here: see /docs."))
        body = document(error.status_code, "http_error", error.detail, f"{error.detail}: see /docs.")
        return Response(json.dumps(body), error.status_code, error.headers, MEDIA_TYPE)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:  # pyright: ignore[reportUnusedFunction]
        log.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
        body = document(500, BackcastError.code, BackcastError.title, "Please report this; the log has the details.")
        return Response(json.dumps(body), 500, media_type=MEDIA_TYPE)


def _all(kind: type[BackcastError]) -> Iterator[type[BackcastError]]:
    yield kind
    for sub in kind.__subclasses__():
        yield from _all(sub)


router = APIRouter(tags=["problems"], route_class=Route)


@router.get("/problems/{code}", summary="Explain a problem")
async def explain(code: str) -> dict[str, str]:
    for kind in _all(BackcastError):
        if kind.code == code:
            about = inspect.cleandoc(kind.__doc__ or kind.title)
            where = "the error of a failed run" if issubclass(kind, RunError) else f"HTTP {kind.status}"
            return {"code": code, "title": kind.title, "seen_in": where, "about": about}
    raise NotFound(f"{code} is a task's own error code, or none at all.")


def responses(*kinds: type[ClientError | Unavailable]) -> dict[int | str, dict[str, Any]]:
    """For a route's declaration: the problems that it answers with."""
    found: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        entry = found.setdefault(kind.status, {"model": ProblemDocument, "description": kind.title})
        if kind.title not in entry["description"]:
            entry["description"] += f"; {kind.title}"
    return found
