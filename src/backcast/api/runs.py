"""Runs: submit, get, wait, fetch the result, cancel."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from pydantic import BaseModel

from backcast.api import problems
from backcast.api.body import json_body, validate
from backcast.api.deps import Backend, Deps, backend
from backcast.api.fast_path import RUN_ID, FastRoute, in_header, in_path, run_id
from backcast.api.submit import idempotency_key, submit
from backcast.errors import (
    BodyTooLarge,
    IdempotencyConflict,
    InvalidInput,
    InvalidTarget,
    LedgerUnavailable,
    MalformedBody,
    NoResult,
    NotFinished,
    NoWorkerYet,
    ResultGone,
    StoreUnavailable,
    TooManyWaiting,
    UnknownRun,
    UnknownTask,
    UnsupportedBody,
)
from backcast.ledger import runs
from backcast.ledger.runs import Result
from backcast.models import Run, State, Submission
from backcast.process.outages import backoff
from backcast.store import Missing

T = TypeVar("T")

router = APIRouter(prefix="/v1", tags=["runs"])
hot = APIRouter(prefix="/v1", tags=["runs"], route_class=FastRoute)
"""The routes that every run uses: submit, get."""

LONGEST_WAIT = 50.0
"""The most seconds that `Prefer: wait` may ask for: proxies cut a request off after 60."""
_WAIT = re.compile(r"\bwait\s*=\s*\"?(\d{1,6})\"?")

_PREFER = in_header(
    "Prefer", f"`wait=N`: answer once the run has ended, or after N seconds (at most {LONGEST_WAIT:.0f})."
)
IDEMPOTENCY_KEY = in_header("Idempotency-Key", "Repeat a request safely: same key, same run.")

SUBMIT_PROBLEMS = problems.responses(
    MalformedBody,
    BodyTooLarge,
    UnsupportedBody,
    InvalidInput,
    InvalidTarget,
    IdempotencyConflict,
    TooManyWaiting,
    LedgerUnavailable,
    NoWorkerYet,
    StoreUnavailable,
)


def json_request(model: type[BaseModel]) -> dict[str, object]:
    """For the OpenAPI document: bodies are read by `body.py`, so FastAPI does not see their shape."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@hot.post(
    "/tasks/{name}/runs",
    status_code=202,
    summary="Submit a run",
    response_model=Run,
    responses=problems.responses(UnknownTask) | SUBMIT_PROBLEMS,
    openapi_extra={"parameters": [in_path("name"), IDEMPOTENCY_KEY], **json_request(Submission)},
)
async def submit_run(request: Request) -> Response:
    submission = validate(Submission, await json_body(request))
    submitted = await submit(backend(request), request.path_params["name"], submission, key=idempotency_key(request))
    headers = {"Location": f"/v1/runs/{submitted.run.id}", "Retry-After": "1"}
    if not submitted.fresh:
        headers["Idempotent-Replayed"] = "true"
    return Response(submitted.run.model_dump_json(), 202, headers, "application/json")


class RunList(BaseModel):
    items: list[Run]
    next_cursor: UUID | None
    """Pass it as `cursor` for the next page; None on the last one. If a filter matches few of very many runs, a page
    before the last one may be short or empty."""


@router.get(
    "/runs", summary="List runs, the newest first", responses=problems.responses(InvalidInput, LedgerUnavailable)
)
async def list_runs(
    deps: Deps,
    state: State | None = None,
    task: Annotated[str | None, Query(max_length=200)] = None,
    owner: Annotated[str | None, Query(max_length=200)] = None,
    batch: UUID | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: UUID | None = None,
) -> RunList:
    for name, value in (("task", task), ("owner", owner)):
        if value is not None and "\x00" in value:
            raise InvalidInput(f"query/{name}: NUL is not allowed.")
    found, following = await runs.find(
        deps.ledger, limit=limit, before=cursor, state=state, task=task, owner=owner, batch=batch
    )
    return RunList(items=found, next_cursor=following)


@hot.get(
    "/runs/{run_id}",
    summary="Get a run",
    response_model=Run,
    responses=problems.responses(UnknownRun, LedgerUnavailable),
    openapi_extra={"parameters": [RUN_ID, _PREFER]},
)
async def get_run(request: Request) -> Response:
    asked = _WAIT.search(request.headers.get("prefer", ""))
    run = await _ended(backend(request), run_id(request), min(float(asked[1]), LONGEST_WAIT) if asked else 0.0)
    headers = {"Preference-Applied": f"wait={asked[1]}"} if asked else {}
    if not run.state.is_final:
        headers["Retry-After"] = "1"
    return Response(run.model_dump_json(), 200, headers, "application/json")


async def _ended(deps: Backend, run_id: UUID, wait: float) -> Run:
    """The run, once it has ended or `wait` seconds have passed; it is read seldom enough for many to wait at once."""
    deadline, delays = time.monotonic() + wait, backoff(0.02, 1.0, factor=1.5)
    while True:
        run = await runs.get(deps.ledger, run_id)
        left = deadline - time.monotonic()
        if run.state.is_final or left <= 0:
            return run
        await asyncio.sleep(min(next(delays), left))


@router.get(
    "/runs/{run_id}/result",
    summary="Get the result of a run",
    response_model=None,
    responses={
        200: {"description": "The result, any JSON value", "content": {"application/json": {"schema": {}}}},
        307: {"description": "A large result: fetch it from the store itself, within five minutes"},
        **problems.responses(UnknownRun, NotFinished, NoResult, ResultGone, LedgerUnavailable, StoreUnavailable),
    },
)
async def get_result(run_id: UUID, deps: Deps) -> Response:
    found = await runs.result(deps.ledger, run_id)
    if not found.run.state.is_final:
        raise NotFinished(f"The run is {found.run.state.value}: ask again, or wait with `Prefer: wait` on the run.")
    if found.run.state is not State.COMPLETED:
        why = f": {found.run.error.code}, {found.run.error.detail}" if found.run.error else ""
        raise NoResult(f"The run is {found.run.state.value}{why}.")
    if found.text is not None:
        return Response(found.text, media_type="application/json")
    if (link := await _stored(found, deps.store.link)) is not None:
        return RedirectResponse(link, headers={"Cache-Control": "no-store"})
    return StreamingResponse(await stored(deps, found), media_type="application/json")


async def stored(deps: Backend, found: Result) -> AsyncIterator[bytes]:
    """The stored result in chunks; an error before the first one still becomes a problem document."""
    return await _stored(found, deps.store.stream)


async def _stored(found: Result, take: Callable[[str], Awaitable[T]]) -> T:
    assert found.key is not None
    try:
        return await take(found.key)
    except Missing:
        raise ResultGone("The run completed, but its result is no longer in the store: submit it again.") from None


@router.post(
    "/runs/{run_id}/cancel",
    summary="Cancel a run",
    description="A queued run never starts; a running one is asked to stop. A run that has ended stays as it is.",
    responses=problems.responses(UnknownRun, LedgerUnavailable),
)
async def cancel_run(run_id: UUID, deps: Deps) -> Run:
    return await runs.cancel(deps.ledger, run_id)
