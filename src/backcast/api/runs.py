"""Runs: submit, get, wait, fetch the result, cancel."""

from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from backcast.api import objects, problems
from backcast.api.body import json_body, validate
from backcast.api.deps import Backend, Deps, backend
from backcast.api.fast_path import NAME, RUN_ID, FastRoute, in_header, run_id
from backcast.api.routing import LABEL, LabelledRoute, Route
from backcast.api.submit import idempotency_key, submit
from backcast.api.waits import LONGEST
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
from backcast.ledger import listing, runs
from backcast.ledger.runs import Value
from backcast.ledger.submissions import SubmittedRun
from backcast.models import Moment, Name, Run, Selection, State, Submission, Words

router = APIRouter(prefix="/v1", tags=["runs"], route_class=Route)
hot = APIRouter(prefix="/v1", tags=["runs"], route_class=FastRoute)
"""The routes that every run uses: submit, get."""

PREFER = in_header(
    "Prefer",
    f"`wait=N`: answer once the run has ended, or after N seconds (at most {LONGEST}), or at once if too many wait.",
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


ENDED: dict[int | str, dict[str, Any]] = {
    200: {"model": Run, "description": "The run has ended: only with `Prefer: wait`"}
}


def json_request(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """For the OpenAPI document: bodies are read by `body.py`, so FastAPI does not see their shape."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


@hot.post(
    "/tasks/{name:name}/runs",
    status_code=202,
    summary="Submit a run",
    response_model=Run,
    responses=ENDED | problems.responses(UnknownTask) | SUBMIT_PROBLEMS,
    openapi_extra={"parameters": [NAME, IDEMPOTENCY_KEY, PREFER], **json_request(Submission)},
)
async def submit_run(request: Request) -> Response:
    submission, deps = validate(Submission, await json_body(request)), backend(request)
    return await accepted(
        request, await submit(deps, request.path_params["name"], submission, key=idempotency_key(request))
    )


async def accepted(request: Request, submitted: SubmittedRun) -> Response:
    """The answer for a new run, which may be waited for."""
    run, headers = await backend(request).waits.until_ended(request, submitted.run)
    headers |= {"Location": f"/v1/runs/{run.id}"}
    if not submitted.fresh:
        headers["Idempotent-Replayed"] = "true"
    if run.state.is_final:
        return Response(run.model_dump_json(), 200, headers, "application/json")
    return Response(run.model_dump_json(), 202, headers | {"Retry-After": "1"}, "application/json")


class RunList(BaseModel):
    items: list[Run]
    next_cursor: UUID | None
    """Pass it as `cursor` for the next page; None on the last one. If a filter matches few of very many runs, a page
    before the last one may be short or empty."""


async def list_runs(
    request: Request,
    deps: Deps,
    state: State | None = None,
    task: Name | None = None,
    owner: Name | None = None,
    batch: UUID | None = None,
    lane: Name | None = None,
    worker: UUID | None = None,
    error: Words | None = None,
    text: Words | None = None,
    created_after: Moment | None = None,
    created_before: Moment | None = None,
    ended_after: Moment | None = None,
    ended_before: Moment | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: UUID | None = None,
) -> RunList:
    given: dict[str, Any] = {
        "state": state,
        "task": task,
        "owner": owner,
        "batch": batch,
        "lane": lane,
        "worker": worker,
        "error": error,
        "text": text,
        "created_after": created_after,
        "created_before": created_before,
        "ended_after": ended_after,
        "ended_before": ended_before,
    }
    labels = {name[len(LABEL) :]: value for name, value in request.query_params.items() if name.startswith(LABEL)}
    filters = validate(Selection, {**given, "metadata": labels})
    found, following = await listing.find(deps.ledger, limit=limit, before=cursor, filters=filters)
    return RunList(items=found, next_cursor=following)


router.add_api_route(
    "/runs",
    list_runs,
    methods=["GET"],
    route_class_override=LabelledRoute,
    summary="List runs, the newest first",
    description=(
        "All filters hold together. `error` is the code of a run's error, `text` a part of its detail;"
        " `metadata.NAME=VALUE` a label, up to five of them. An index finds the runs of a batch, an owner or a state,"
        " and of a time of submission; of those that it finds, each request looks at the next 10,000 with the other"
        " filters, so a page may be short and not the last."
    ),
    responses=problems.responses(InvalidInput, LedgerUnavailable),
)


@hot.get(
    "/runs/{run_id:run}",
    summary="Get a run",
    response_model=Run,
    responses=problems.responses(UnknownRun, LedgerUnavailable),
    openapi_extra={"parameters": [RUN_ID, PREFER]},
)
async def get_run(request: Request) -> Response:
    deps = backend(request)
    run, headers = await deps.waits.until_ended(request, await runs.get(deps.ledger, run_id(request)))
    if not run.state.is_final:
        headers["Retry-After"] = "1"
    return Response(run.model_dump_json(), 200, headers, "application/json")


@router.get(
    "/runs/{run_id}/result",
    summary="Get the result of a run",
    response_model=None,
    responses={
        200: {"description": "The result, any JSON value", "content": {"application/json": {"schema": {}}}},
        307: objects.REDIRECT,
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
    assert found.key is not None
    return await objects.response(deps.store, found.key, _result_gone())


async def stored(deps: Backend, found: Value) -> AsyncIterator[bytes]:
    """The stored result in chunks; an error before the first one still becomes a problem document."""
    assert found.key is not None
    return await objects.taken(deps.store.stream, found.key, _result_gone())


def _result_gone() -> ResultGone:
    return ResultGone("The run completed, but its result is no longer in the store: submit it again.")


@router.post(
    "/runs/{run_id}/cancel",
    summary="Cancel a run",
    description="A queued run never starts; a running one is asked to stop. A run that has ended stays as it is.",
    responses=problems.responses(UnknownRun, LedgerUnavailable),
)
async def cancel_run(run_id: UUID, deps: Deps) -> Run:
    return await runs.cancel(deps.ledger, run_id)
