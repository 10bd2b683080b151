"""Pools: what waits in them, and their workers."""

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel

from backcast.api import problems
from backcast.api.deps import Deps
from backcast.api.routing import Route
from backcast.errors import LedgerUnavailable, UnknownPool
from backcast.ledger import overview
from backcast.models import Name, Pool

router = APIRouter(prefix="/v1/pools", tags=["pools"], route_class=Route)


class PoolList(BaseModel):
    items: list[Pool]


@router.get("", summary="List the pools", responses=problems.responses(LedgerUnavailable))
async def list_pools(deps: Deps) -> PoolList:
    return PoolList(items=await overview.pools(deps.ledger))


@router.get("/{name:name}", summary="Get a pool", responses=problems.responses(UnknownPool, LedgerUnavailable))
async def get_pool(name: Annotated[Name, Path()], deps: Deps) -> Pool:
    return await overview.pool(deps.ledger, name)
