"""Task types: the tasks that can be run, and their input."""

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel

from backcast.api import problems
from backcast.api.deps import Deps
from backcast.api.routing import Route
from backcast.errors import LedgerUnavailable, UnknownTask
from backcast.ledger import overview, task_types
from backcast.models import Name, TaskType

router = APIRouter(prefix="/v1/tasks", tags=["tasks"], route_class=Route)


class TaskList(BaseModel):
    items: list[TaskType]


@router.get("", summary="List the tasks that can be run", responses=problems.responses(LedgerUnavailable))
async def list_tasks(deps: Deps) -> TaskList:
    return TaskList(items=await task_types.all_(deps.ledger))


@router.get("/{name:name}", summary="Get a task", responses=problems.responses(UnknownTask, LedgerUnavailable))
async def get_task(name: Annotated[Name, Path()], deps: Deps) -> TaskType:
    return await overview.task(deps.ledger, name)
