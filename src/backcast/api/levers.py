"""Levers: pause and resume a task, a lane or a pool, and drain a worker."""

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel

from backcast.api import problems
from backcast.api.body import optional_body, validate
from backcast.api.deps import Backend, Deps
from backcast.api.routing import Route
from backcast.api.runs import json_request
from backcast.errors import (
    FieldError,
    InvalidInput,
    LedgerUnavailable,
    MalformedBody,
    NotFound,
    UnknownPool,
    UnknownTask,
    UnknownWorker,
    UnsupportedBody,
)
from backcast.ledger import fleet, pauses, task_types
from backcast.models import Name, Pause, PauseKind, PauseRequest

router = APIRouter(prefix="/v1", tags=["levers"], route_class=Route)

_ABOUT = """Nothing new of it starts, of what is queued already neither: such runs wait, outside of the counts of their
lanes, until it is resumed or `until` has come. What runs goes on, or is released. A run that a worker has just claimed
may still begin within a second. To pause again changes the reason and the end."""


class PauseList(BaseModel):
    items: list[Pause]


async def _check(deps: Backend, kind: PauseKind, name: str) -> None:
    """Any name may be one of a lane."""
    if kind is PauseKind.TASK:
        await task_types.get(deps.ledger, name)
    elif kind is PauseKind.POOL:
        await task_types.require_pool(deps.ledger, name)


@router.get("/pauses", summary="List what is paused", responses=problems.responses(LedgerUnavailable))
async def list_pauses(deps: Deps) -> PauseList:
    return PauseList(items=await pauses.all_(deps.ledger))


def _add(kind: PauseKind, *unknown: type[NotFound]) -> None:
    async def pause(name: Annotated[Name, Path()], request: Request, deps: Deps) -> Pause:
        asked = validate(PauseRequest, await optional_body(request))
        if asked.until is not None and asked.until <= datetime.now(UTC):
            why = "the time has passed; send a later one, or none"
            raise InvalidInput(f"/until: {why}.", errors=(FieldError("/until", why),))
        await _check(deps, kind, name)
        return await pauses.pause(deps.ledger, kind, name, asked)

    async def resume(name: Annotated[Name, Path()], deps: Deps) -> Response:
        await _check(deps, kind, name)
        await pauses.resume(deps.ledger, kind, name)
        return Response(status_code=204)

    refusals = problems.responses(*unknown, MalformedBody, UnsupportedBody, InvalidInput, LedgerUnavailable)
    router.add_api_route(
        f"/{kind}s/{{name:name}}/pause",
        pause,
        methods=["POST"],
        name=f"pause_{kind}",
        summary=f"Pause a {kind}",
        description=_ABOUT,
        responses=refusals,
        openapi_extra=json_request(PauseRequest, required=False),
    )
    router.add_api_route(
        f"/{kind}s/{{name:name}}/resume",
        resume,
        methods=["POST"],
        name=f"resume_{kind}",
        status_code=204,
        summary=f"Resume a {kind}",
        description="What is not paused stays as it is.",
        responses=problems.responses(*unknown, LedgerUnavailable),
    )


_add(PauseKind.TASK, UnknownTask)
_add(PauseKind.LANE)
_add(PauseKind.POOL, UnknownPool)


@router.post(
    "/workers/{worker_id}/drain",
    status_code=202,
    response_class=Response,  # it has no body
    summary="Drain a worker",
    description="It claims nothing more, lets its runs finish within its grace period, releases the rest, and ends. A"
    " new one takes its place where something restarts it, as in Kubernetes.",
    responses=problems.responses(UnknownWorker, LedgerUnavailable),
)
async def drain_worker(worker_id: UUID, deps: Deps) -> Response:
    await fleet.drain(deps.ledger, worker_id)
    return Response(status_code=202)
