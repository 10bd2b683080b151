"""Events: what happens to a run or a batch, as a stream of server-sent events."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from backcast.api import problems
from backcast.api.deps import Deps
from backcast.api.fast_path import in_header
from backcast.api.routing import Route
from backcast.api.streams import MEDIA_TYPE
from backcast.errors import LedgerUnavailable, TooManyStreams, UnknownBatch, UnknownRun

router = APIRouter(prefix="/v1", tags=["events"], route_class=Route)

_LAST = in_header(
    "Last-Event-ID", "The id of the last event that was seen: the stream goes on after it, on any API process."
)


def _stream(*names: str) -> dict[int | str, dict[str, Any]]:
    """For a route's declaration: a stream of events with these names, of which the schema describes one."""
    data = {"type": "string", "contentMediaType": "application/json"}
    fields = {"id": {"type": "string"}, "event": {"enum": list(names)}, "data": data}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    return {
        200: {"description": "Server-sent events", "content": {MEDIA_TYPE: {"schema": schema}}},
        204: {"description": "The last event has been seen already"},
    }


@router.get(
    "/runs/{run_id}/events",
    summary="Follow a run",
    description=(
        "All that has happened to the run, from its submission, and what happens from now on, in its order; each state"
        " is sent once. `queued`; `started` and `retrying`, each with the number of the `attempt`; `progress`, the"
        " newest one (`fraction`, `message`); `output`, with the `kind` and the `data` that the task has emitted;"
        " `dropped`, with the number of outputs that an attempt lacks; `ended`, with the `run`, and its `result` if it"
        " has at most 32 KiB. With `logs=true`, also `log`, a line of the run's log as in `/logs`, within about 2 s,"
        " also after the `retrying` of its attempt. The stream ends after `ended`; before that, a reader connects again"
        " with `Last-Event-ID`. When nothing happens, a comment comes every 15 s. A run that is released by"
        " its worker goes on in the same attempt, which is not started again."
    ),
    response_model=None,
    responses=_stream("queued", "started", "progress", "output", "dropped", "retrying", "log", "ended")
    | problems.responses(UnknownRun, TooManyStreams, LedgerUnavailable),
    openapi_extra={"parameters": [_LAST]},
)
async def follow_run(run_id: UUID, request: Request, deps: Deps, logs: Annotated[bool, Query()] = False) -> Response:
    return await deps.streams.run(request, run_id, with_log=logs)


@router.get(
    "/batches/{batch_id}/events",
    summary="Follow a batch",
    description=(
        "`states`: the batch with its runs counted by state, at first and whenever they have changed, about once a"
        " second; `runs`: up to 500 that have ended (`items` with `id` and `state`), each once, some seconds after its"
        " end; `ended`: the batch, once all its runs have ended. The rest is as for a run."
    ),
    response_model=None,
    responses=_stream("states", "runs", "ended") | problems.responses(UnknownBatch, TooManyStreams, LedgerUnavailable),
    openapi_extra={"parameters": [_LAST]},
)
async def follow_batch(batch_id: UUID, request: Request, deps: Deps) -> Response:
    return await deps.streams.batch(request, batch_id)
