"""The collaborators that routes get: the ledger, the store, and the task types that workers have registered."""

import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from backcast import settings
from backcast.api.streams import Streams
from backcast.api.waits import Waits
from backcast.api.watching import Watching
from backcast.ledger import task_types
from backcast.ledger.admission import Admission
from backcast.ledger.connection import Ledger
from backcast.ledger.counts import Recent
from backcast.ledger.submissions import Submissions
from backcast.models import TaskType
from backcast.process.metrics import ApiMetrics
from backcast.store import Store
from backcast.targets.inputs import Inputs

_FRESH = 2.0
"""Seconds for which a task type is not looked up again."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a task, with the check of its inputs that is made once."""

    task: TaskType
    inputs: Inputs


@dataclass(frozen=True, slots=True)
class Known:
    """The versions of a task for which inputs are accepted, the newest first."""

    versions: list[Version]
    at: float


class Backend:
    """The collaborators of one API process."""

    def __init__(self, ledger: Ledger, store: Store, limits: settings.Api, metrics: ApiMetrics) -> None:
        self.ledger = ledger
        self.store = store
        self.limits = limits
        self.metrics = metrics
        self.submissions = Submissions(ledger, metrics.submitted_at_once)
        self.admission = Admission(ledger, most=limits.max_waiting, most_per_owner=limits.max_waiting_per_owner)
        self.recent = Recent(ledger)
        watching = self._watching = Watching(ledger)
        self.waits = Waits(ledger, watching, limits.max_waits)
        self.streams = Streams(ledger, store, watching, most=limits.max_streams, longest=limits.longest_stream)
        metrics.show(waits=lambda: self.waits.held, streams=lambda: self.streams.count)
        self._known: dict[str, Known] = {}

    def stop(self) -> None:
        """Answer those who wait, and end the streams."""
        self.waits.stop()
        self.streams.stop()
        self._watching.stop()

    async def known(self, name: str) -> Known:
        """Raises `UnknownTask`."""
        known = self._known.get(name)
        if known is None or time.monotonic() - known.at > _FRESH:
            found = await task_types.versions(self.ledger, name)
            versions = [Version(task, Inputs(task.input_schema)) for task in found]
            known = self._known[name] = Known(versions, time.monotonic())
        return known


def backend(request: Request) -> Backend:
    return request.app.state.backend


async def _backend(request: Request) -> Backend:  # async, or FastAPI asks a thread for it
    return backend(request)


Deps = Annotated[Backend, Depends(_backend)]
