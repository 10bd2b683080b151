"""What routes are given: the ledger, the store, and the task types as the workers have registered them."""

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from backcast.ledger import Ledger, workers
from backcast.models import TaskType
from backcast.store import Store

_FRESH = 2.0
"""Seconds for which a task type is not looked up again."""


@dataclass
class Backend:
    """The collaborators of one API process."""

    ledger: Ledger
    store: Store
    _types: dict[str, tuple[float, TaskType]] = field(default_factory=dict[str, tuple[float, TaskType]])

    async def task_type(self, name: str) -> TaskType:
        """Raises `UnknownTask`."""
        known = self._types.get(name)
        if known is None or time.monotonic() - known[0] > _FRESH:
            known = self._types[name] = (time.monotonic(), await workers.task_type(self.ledger, name))
        return known[1]


def _backend(request: Request) -> Backend:
    return request.app.state.backend


Deps = Annotated[Backend, Depends(_backend)]
