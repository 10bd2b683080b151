"""Turns every error into a problem document (RFC 9457): `type` is a link that explains it, `code` is stable, `detail`
explains what to do, `errors` names each wrong field by JSON pointer.
"""

import inspect
import json
import logging
import math
import time
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from backcast.api.prefix import of_links
from backcast.api.routing import Route
from backcast.api.run_codes import RUN_CODES
from backcast.errors import (
    BackcastError,
    ClientError,
    FieldError,
    InvalidInput,
    MalformedBody,
    MethodNotAllowed,
    NotFinished,
    NotFound,
    RunError,
    TooManyWaiting,
    Unauthorized,
    Unavailable,
    UnknownBatch,
    UnknownOperation,
    UnknownRun,
    UnknownWorker,
)
from backcast.models import Name

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


_NO_UUID = {
    "run_id": UnknownRun("A run id is a UUID: use the one that the submission returned."),
    "batch_id": UnknownBatch("A batch id is a UUID: use the one that the submission returned."),
    "operation_id": UnknownOperation("An operation id is a UUID: use the one that the request returned."),
    "worker_id": UnknownWorker("A worker id is a UUID: see GET /v1/workers."),
}


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
        first = fields[0]["loc"]
        if first[0] == "path" and first[-1] in _NO_UUID:
            return respond(_NO_UUID[first[-1]])
        where = tuple(FieldError("/".join(map(str, field["loc"])), field["msg"]) for field in fields)
        return respond(InvalidInput(f"{where[0].pointer}: {where[0].detail}.", errors=where))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:  # pyright: ignore[reportUnusedFunction]
        path = request.scope["path"]
        if error.status_code == 404:
            return respond(NotFound(f"There is no {path} here: see /docs."))
        if error.status_code == 405:
            allowed = ", ".join(_methods(request))
            answer = respond(MethodNotAllowed(f"{path} does not take {request.method}: it takes {allowed}; see /docs."))
            answer.headers["Allow"] = allowed
            return answer
        return respond(MalformedBody(f"{error.detail}: see /docs."))  # of a form

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:  # pyright: ignore[reportUnusedFunction]
        return respond(MalformedBody("The connection was closed before the body was complete."))  # nobody reads it

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:  # pyright: ignore[reportUnusedFunction]
        log.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
        body = document(500, BackcastError.code, BackcastError.title, "Please report this; the log has the details.")
        return Response(json.dumps(body), 500, media_type=MEDIA_TYPE)


def _methods(request: Request) -> list[str]:
    """The methods of all routes with this path."""
    found = set[str]()
    scope = {**request.scope, "root_path": ""}  # a mount has put a part of the path there
    for route in request.app.router.routes:
        if route.matches(scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or {"GET"}  # a mount, which is of files
    return sorted(found | {"HEAD"} if "GET" in found else found)


def _all(kind: type[BackcastError]) -> Iterator[type[BackcastError]]:
    yield kind
    for sub in kind.__subclasses__():
        yield from _all(sub)


def responses(*kinds: type[BackcastError]) -> dict[int | str, dict[str, Any]]:
    """For a route's declaration: the problems that it answers with."""
    found: dict[int | str, dict[str, Any]] = {}
    content = {MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{ProblemDocument.__name__}"}}}
    for kind in kinds:
        entry = found.setdefault(kind.status, {"description": kind.title, "content": content})
        if kind.title not in entry["description"]:
            entry["description"] += f"; {kind.title}"
    return found


def schemas() -> dict[str, Any]:
    """The components of the OpenAPI document that `responses` refers to."""
    schema = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    return schema.pop("$defs") | {ProblemDocument.__name__: schema}


router = APIRouter(tags=["problems"], route_class=Route)


class ProblemPage(BaseModel):
    code: str
    title: str
    seen_in: str
    about: str


@router.get("/problems/{code:name}", summary="Explain a problem", responses=responses(NotFound))
async def explain(code: Annotated[Name, Path()]) -> ProblemPage:
    for kind in _all(BackcastError):
        if kind.code == code and not issubclass(kind, RunError):
            about = inspect.cleandoc(kind.__doc__ or f"{kind.title}.")
            return ProblemPage(code=code, title=kind.title, seen_in=f"HTTP {kind.status}", about=about)
    if (page := RUN_CODES.get(code)) is not None:
        return ProblemPage(code=code, title=page[0], seen_in="the error of a run", about=page[1])
    raise NotFound(f"{code} is a task's own error code, or none at all.")
