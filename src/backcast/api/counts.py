"""Counts: how many runs came and ended lately."""

from fastapi import APIRouter

from backcast.api import problems
from backcast.api.deps import Deps
from backcast.api.routing import Route
from backcast.errors import InvalidInput, LedgerUnavailable
from backcast.models import Counts, Within

router = APIRouter(prefix="/v1/counts", tags=["counts"], route_class=Route)


@router.get(
    "",
    summary="Count the runs of the last hour or day",
    description="By state, task and error, and over time. It costs about the same however many runs there are: more"
    " than some 10,000 are estimated, and `approximate` is true then. Answers are repeated for a moment.",
    responses=problems.responses(InvalidInput, LedgerUnavailable),
)
async def count_runs(deps: Deps, within: Within = Within.HOUR) -> Counts:
    return await deps.recent.counts(within)
