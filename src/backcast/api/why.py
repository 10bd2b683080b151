"""Why a run is where it is."""

from uuid import UUID

from fastapi import APIRouter

from backcast.api import problems
from backcast.api.deps import Deps
from backcast.api.routing import Route
from backcast.errors import LedgerUnavailable, UnknownRun
from backcast.ledger import why
from backcast.models import Why

router = APIRouter(prefix="/v1/runs", tags=["runs"], route_class=Route)


@router.get(
    "/{run_id}/why",
    summary="Explain where a run is, and what it waits for",
    description="Positions are counted up to a bound, and estimates are approximate: other runs may come before it.",
    response_model_exclude_none=True,
    responses=problems.responses(UnknownRun, LedgerUnavailable),
)
async def explain_run(run_id: UUID, deps: Deps) -> Why:
    return await why.explain(deps.ledger, run_id)
