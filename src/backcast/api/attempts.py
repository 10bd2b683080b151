"""The attempts of a run: how each ended, and why it did not succeed."""

from uuid import UUID

from fastapi import APIRouter

from backcast.api import problems
from backcast.api.deps import Deps
from backcast.api.routing import Route
from backcast.errors import LedgerUnavailable, UnknownRun
from backcast.ledger import attempts
from backcast.models import Attempts

router = APIRouter(prefix="/v1/runs", tags=["runs"], route_class=Route)


@router.get(
    "/{run_id}/attempts",
    summary="List the attempts of a run, the oldest first",
    responses=problems.responses(UnknownRun, LedgerUnavailable),
)
async def list_attempts(run_id: UUID, deps: Deps) -> Attempts:
    return await attempts.get(deps.ledger, run_id)
