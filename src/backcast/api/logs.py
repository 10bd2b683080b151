"""Logs: what the code of a run has logged and printed."""

from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from backcast.api import problems
from backcast.api.batches import JSON_LINES, LINES
from backcast.api.deps import Deps
from backcast.api.routing import Route
from backcast.api.run_log import RunLog
from backcast.errors import LedgerUnavailable, StoreUnavailable, TooManyStreams, UnknownRun
from backcast.ledger import runs
from backcast.models import LOGS_KEPT

router = APIRouter(prefix="/v1", tags=["runs"], route_class=Route)


@router.get(
    "/runs/{run_id}/logs",
    summary="Get the log of a run",
    description=(
        "What the run's code has logged, from level INFO on, and printed, one JSON object per line: `at`, `level`,"
        " `logger` (`stdout`, `stderr` for prints), `message`, `attempt`. An attempt has up to 10,000 lines, 1 MiB:"
        f" a last line counts those that were dropped. Of the latest {LOGS_KEPT} attempts that began. While an attempt"
        " runs, its lines come about 10 s late. With `follow=true` the answer goes on until the run has ended, and"
        " lines come within about 2 s; an empty line comes every 15 s when there is no other. An answer that is cut"
        " off, and does not end, is not complete: the stream of events, with `logs=true`, goes on where it was lost."
    ),
    response_model=None,
    responses=LINES | problems.responses(UnknownRun, LedgerUnavailable, StoreUnavailable, TooManyStreams),
)
async def get_logs(run_id: UUID, request: Request, deps: Deps, follow: Annotated[bool, Query()] = False) -> Response:
    if follow:
        return await deps.streams.logs(request, run_id, JSON_LINES)
    lines = RunLog(deps.store, run_id).lines(await runs.latest_fence(deps.ledger, run_id))
    first = await anext(lines, b"")  # an error before it becomes a problem document
    return StreamingResponse(_joined(first, lines), media_type=JSON_LINES)


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for lines in rest:
        yield lines
