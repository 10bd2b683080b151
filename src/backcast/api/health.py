"""Probes: the process is alive; the database and the store are reachable."""

import asyncio

from fastapi import APIRouter

from backcast.api import problems
from backcast.api.deps import Deps
from backcast.api.routing import Route
from backcast.errors import LedgerUnavailable, StoreUnavailable

router = APIRouter(tags=["health"], route_class=Route)


@router.get("/livez", summary="The process is alive")
async def livez() -> dict[str, str]:
    return {"status": "alive"}


@router.get(
    "/readyz",
    summary="The database and the store are reachable",
    responses=problems.responses(LedgerUnavailable, StoreUnavailable),
)
async def readyz(deps: Deps) -> dict[str, str]:
    await asyncio.gather(deps.ledger.check(), deps.store.check())
    return {"status": "ready"}
