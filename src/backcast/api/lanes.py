"""Lanes: limits on the runs that run at once, or start in a minute."""

from typing import Annotated

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel

from backcast.api import problems
from backcast.api.body import JSONBody, validate
from backcast.api.deps import Deps
from backcast.api.routing import Route
from backcast.api.runs import json_request
from backcast.errors import FieldError, InvalidInput, LedgerUnavailable, MalformedBody, UnknownLane, UnsupportedBody
from backcast.ledger import limits
from backcast.models import Lane, Limits, Name

router = APIRouter(prefix="/v1/lanes", tags=["lanes"], route_class=Route)

LaneName = Annotated[Name, Path()]


class LaneList(BaseModel):
    items: list[Lane]


@router.get("", summary="List the lanes with limits or a pause", responses=problems.responses(LedgerUnavailable))
async def list_lanes(deps: Deps) -> LaneList:
    return LaneList(items=await limits.all_(deps.ledger))


@router.get("/{name:name}", summary="Get a lane", responses=problems.responses(UnknownLane, LedgerUnavailable))
async def get_lane(name: LaneName, deps: Deps) -> Lane:
    return await limits.get(deps.ledger, name)


@router.put(
    "/{name:name}",
    summary="Limit a lane",
    description="Replaces both limits. Runs that are queued beyond them are held back; what runs goes on.",
    responses=problems.responses(MalformedBody, UnsupportedBody, InvalidInput, LedgerUnavailable),
    openapi_extra=json_request(Limits),
)
async def limit_lane(name: LaneName, body: JSONBody, deps: Deps) -> Lane:
    wanted = validate(Limits, body)
    if wanted.max_running is None and wanted.max_per_minute is None:
        raise InvalidInput(
            "Set max_running or max_per_minute, or both; DELETE lifts the limits.",
            errors=(FieldError("", "no limit is set"),),
        )
    return await limits.limit(deps.ledger, name, wanted)


@router.delete(
    "/{name:name}",
    status_code=204,
    summary="Lift the limits of a lane",
    description="Runs that wait for the lane go on.",
    responses=problems.responses(UnknownLane, LedgerUnavailable),
)
async def lift_lane(name: LaneName, deps: Deps) -> Response:
    await limits.lift(deps.ledger, name)
    return Response(status_code=204)
