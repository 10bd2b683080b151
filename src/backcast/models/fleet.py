"""Who does the work: task types, workers, pools, and what waits for them."""

import hashlib
import json
from datetime import datetime, timedelta
from functools import cached_property
from typing import Self
from uuid import UUID

from pydantic import Field, model_validator

from backcast.models.lanes import Pause
from backcast.models.values import JSON, Figure, Noun

WARNINGS = "x-warnings"
"""The keyword of an input schema with the warnings of its task type: an annotation, so the ledger keeps them there."""


CAST = "create_structured_output"
"""The name of the built-in task, as in Prefect's example."""


class Load(Noun):
    """What waits, and who does it. At most 10,000 runs of each kind are counted: a number that reaches this may be
    higher."""

    workers: int
    """Those that are alive and take runs."""
    slots: int
    """Of these workers, as `busy`, for whichever of their tasks."""
    busy: int
    per_minute: Figure
    """Runs of any task that these workers ended in the last minute, about: it follows a change with a delay."""
    ready: int
    """Runs that may start as soon as a slot is free."""
    oldest_age_seconds: Figure | None
    """How long the oldest of them has waited since it could have started."""
    running: int
    parked: int
    """Runs that wait for a worker that has their task, or their version of it."""
    paused: "Pause | None" = None


class Pool(Load):
    """A pool: its backlog and its workers."""

    name: str


class Worker(Noun):
    """A worker, as it has reported itself."""

    id: UUID
    pool: str
    host: str
    version: str
    tasks: list[str]
    slots: int
    busy: int
    """Slots in which code executes."""
    running: int
    """Runs that it has claimed and not settled."""
    settled: int
    """Runs that have ended in it since it started."""
    per_minute: Figure
    """Of these in the last minute, about."""
    started_at: datetime
    heartbeat_age_seconds: Figure
    draining: bool
    """Whether it takes no more runs, or was asked to."""
    takes_runs: bool
    """Whether it is believed to be alive, and does not drain."""


class TaskType(Noun):
    """A task that can be run, as its workers have registered it."""

    name: str
    pool: str
    description: str = ""
    input_schema: dict[str, JSON]
    """JSON Schema (2020-12) of `Submission.input`."""
    output_schema: dict[str, JSON] = Field(default={})
    """JSON Schema of the result; empty when unknown."""
    version: str = ""
    retries: int = 0
    timeout: timedelta | None = None
    """How long one attempt may take."""
    max_attempts: int = 3
    """How often a run may be lost together with its worker before it fails."""
    lane: str | None = None
    """The lane of runs that do not name one."""
    history: bool = True
    """Whether Prefect shows its runs."""
    warnings: list[str] = Field(default=[])
    """What of the task has no effect here, or why it can't be run; also in the input schema, as `x-warnings`."""
    load: Load | None = None
    """Of the task in its pool, where one task is asked for. Its ready runs are counted among the first 10,000 of the
    pool."""

    @model_validator(mode="after")
    def _reads_warnings(self) -> Self:
        self.warnings = self.warnings or list(self.input_schema.get(WARNINGS, ()))
        return self

    @property
    def is_served(self) -> bool:
        """Whether its runs can be executed; a task that can't be run is listed all the same."""
        return self.input_schema.get("not") != {}

    @cached_property
    def signature(self) -> str:
        """Tells versions of the task apart; another one whenever the input schema changes."""
        return hashlib.sha256(json.dumps(self.input_schema, sort_keys=True).encode()).hexdigest()[:12]
