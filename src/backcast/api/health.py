"""Probes: the process is alive; the database and the store are reachable."""

import asyncio
import logging

from fastapi import APIRouter

from backcast.api import problems
from backcast.api.deps import Backend, Deps
from backcast.api.routing import Route
from backcast.errors import LedgerUnavailable, StoreUnavailable
from backcast.process import background

log = logging.getLogger("backcast.api")

router = APIRouter(tags=["health"], route_class=Route)

LOOK_EVERY = 5.0
"""Seconds between two checks whose result is logged when it changes."""


@router.get("/livez", summary="The process is alive")
async def livez() -> dict[str, str]:
    return {"status": "alive"}


@router.get(
    "/readyz",
    summary="The database and the store are reachable",
    responses=problems.responses(LedgerUnavailable, StoreUnavailable),
)
async def readyz(deps: Deps) -> dict[str, str]:
    await check(deps)
    return {"status": "ready"}


async def check(backend: Backend) -> None:
    """Raises `Unavailable`."""
    await asyncio.gather(backend.ledger.check(), backend.store.check())


async def report(backend: Backend) -> None:
    """Log what this process waits for, and when it is there."""
    is_ready = False

    async def look() -> None:
        nonlocal is_ready
        was_ready, is_ready = is_ready, False
        await check(backend)
        is_ready = True
        if not was_ready:
            log.info("ready: the database and the store answer")

    await background.repeat("answer all requests yet", look, LOOK_EVERY)
