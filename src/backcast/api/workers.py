"""Workers: what they serve, and how they are."""

from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel

from backcast.api import problems
from backcast.api.deps import Deps
from backcast.api.routing import Route
from backcast.errors import LedgerUnavailable, UnknownWorker
from backcast.ledger import overview
from backcast.models import Worker

router = APIRouter(prefix="/v1/workers", tags=["workers"], route_class=Route)


class WorkerList(BaseModel):
    items: list[Worker]


@router.get(
    "",
    summary="List the workers, the newest first",
    description="At most 1,000; those that are silent are listed until they are removed.",
    responses=problems.responses(LedgerUnavailable),
)
async def list_workers(deps: Deps) -> WorkerList:
    return WorkerList(items=await overview.workers(deps.ledger))


@router.get("/{worker_id}", summary="Get a worker", responses=problems.responses(UnknownWorker, LedgerUnavailable))
async def get_worker(worker_id: UUID, deps: Deps) -> Worker:
    return await overview.worker(deps.ledger, worker_id)
