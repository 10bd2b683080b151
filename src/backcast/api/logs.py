"""Logs: what the code of a run has logged and printed."""

from collections.abc import AsyncIterator
from uuid import UUID

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from backcast.api import problems
from backcast.api.batches import JSON_LINES, LINES
from backcast.api.deps import Backend, Deps
from backcast.api.routing import Route
from backcast.errors import LedgerUnavailable, StoreUnavailable, UnknownRun
from backcast.ledger import runs
from backcast.models import LOGS_KEPT, log_key
from backcast.store import Missing

router = APIRouter(prefix="/v1", tags=["runs"], route_class=Route)


@router.get(
    "/runs/{run_id}/logs",
    summary="Get the log of a run",
    description=(
        "What the run's code has logged, from level INFO on, and printed, one JSON object per line: `at`, `level`,"
        " `logger` (`stdout`, `stderr` for prints), `message`, `attempt`. An attempt has up to 10,000 lines, 1 MiB:"
        f" a last line counts those that were dropped. Of the latest {LOGS_KEPT} attempts that began. While an attempt"
        " runs, its lines come about 10 s late."
    ),
    response_model=None,
    responses=LINES | problems.responses(UnknownRun, LedgerUnavailable, StoreUnavailable),
)
async def get_logs(run_id: UUID, deps: Deps) -> Response:
    fence = await runs.latest_fence(deps.ledger, run_id)
    logs = _logs(deps, run_id, fence)
    first = await anext(logs, b"")  # an error before it becomes a problem document
    return StreamingResponse(_joined(first, logs), media_type=JSON_LINES)


async def _logs(deps: Backend, run_id: UUID, fence: int) -> AsyncIterator[bytes]:
    for number in range(max(1, fence - LOGS_KEPT + 1), fence + 1):
        try:
            chunks = await deps.store.stream(log_key(run_id, number))
        except Missing:  # it has logged nothing
            continue
        async for chunk in chunks:
            yield chunk


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk
