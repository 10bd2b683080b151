"""The nouns: run, task type, submission and others. Values only; no I/O, no HTTP."""

import secrets
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from backcast.errors import BackcastError

JSON = Any
"""A plain JSON value: None, bool, int, float, str, list, dict with string keys."""


CAST = "create_structured_output"
"""The name of the built-in task, as in Prefect's example."""


class State(StrEnum):
    """Where a run is, as callers see it. `held` and `scheduled` are internal and shown as `queued`."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


def uuid7(ago: float = 0.0) -> UUID:
    """A new run id: time-ordered (RFC 9562, with sub-millisecond bits), made here because PostgreSQL 15 to 17 can't.

    With `ago`, it is an id of so many seconds ago: a bound for ranges of ids.
    """
    now = time.time_ns() - int(ago * 1_000_000_000)
    ms, rest = divmod(now, 1_000_000)
    return UUID(int=ms << 80 | 7 << 76 | rest * 4096 // 1_000_000 << 64 | 2 << 62 | secrets.randbits(62))


def _plain_text(value: str) -> str:
    if "\x00" in value or not value.isprintable():
        raise ValueError("only printable characters are allowed")
    return value


Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain_text)]
"""A short name that ends up in a column: an owner, a lane, a key."""


class _Noun(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Problem(_Noun):
    """The reason why a run, or an attempt of it, did not succeed."""

    code: str
    """Stable; clients may branch on it."""
    title: str
    detail: str

    @classmethod
    def from_error(cls, error: BackcastError) -> Self:
        return cls(code=error.code, title=error.title, detail=error.detail)


class Submission(_Noun):
    """A request to run a task."""

    input: dict[str, JSON] = {}
    """The task's parameters by name; checked against the task's input schema."""
    owner: Label = "default"
    """The party that the run belongs to; owners take turns in the queue."""
    priority: int = Field(default=0, ge=-100, le=100)
    """Higher runs first, among the runs of the same owner."""
    run_at: AwareDatetime | None = None
    """Not before this time (with a time zone)."""
    deadline: AwareDatetime | None = None
    """A run that still waits at this time, for a slot or for another attempt, expires; a running one goes on."""
    lane: Label | None = None
    """The lane of the run, such as a provider's quota; it may have limits. None: the task's own lane, if any."""
    metadata: dict[str, str] = Field(default={}, max_length=32)
    """The caller's own labels; returned with the run, and not read by backcast."""


class Run(_Noun):
    """One run of a task, as callers see it. The result has a route of its own."""

    id: UUID
    """Also the id of the task run in Prefect."""
    task: str
    state: State
    owner: str
    priority: int
    lane: str | None = None
    batch_id: UUID | None = None
    attempts: int
    """Attempts that have been started, the present one included."""
    error: Problem | None = None
    """Set when the state is failed, or when the last attempt failed and another one will be made."""
    usage: dict[str, JSON] | None = None
    """The cost of the run so far, failed attempts included: `model` (its name), `input_tokens`, `output_tokens`."""
    metadata: dict[str, str] = {}
    created_at: datetime
    run_at: datetime
    deadline: datetime | None = None
    started_at: datetime | None = None
    """Start of the latest attempt."""
    finished_at: datetime | None = None


class TaskType(_Noun):
    """A task that can be run, as its workers have registered it."""

    name: str
    pool: str
    description: str = ""
    input_schema: dict[str, JSON]
    """JSON Schema (2020-12) of `Submission.input`."""
    output_schema: dict[str, JSON] = {}
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


class Limits(_Noun):
    """The limits of a lane; at least one of the two is set."""

    max_running: int | None = Field(default=None, ge=0)
    """Runs of the lane that may run at the same time; 0 holds them all."""
    max_per_minute: float | None = Field(default=None, gt=0, le=1_000_000)
    """Attempts that may start in a minute, retries included."""


class Lane(Limits):
    """A lane with limits, and how many of its runs are promoted and held."""

    name: str
    promoted: int
    """Its runs that are running, or may run as soon as a slot is free."""
    held: int
    """Its runs that wait for the lane; counted up to 10,000."""


class Batch(_Noun):
    """Runs that were submitted together."""

    id: UUID
    owner: str
    size: int
    created_at: datetime
    states: dict[State, int] = {}
    """The number of its runs in each state; removed runs are not counted."""


@dataclass(frozen=True, slots=True)
class Succeeded:
    """An attempt that returned a value; `body` is its plain JSON in UTF-8."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt after which no other one is made."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class Retry:
    """An attempt that failed, to be made again after `delay` seconds; `retries` counts the retries with that one."""

    problem: Problem
    delay: float
    retries: int
    behind: str | None = None
    """The flight to wait for: another run computes the same value."""


AttemptResult = Succeeded | Failed | Retry
"""The result of an attempt of a run."""
Reason = Literal["cancelled", "lost", "released"]
"""Why an attempt was stopped: its caller asked, another worker has the run, or this worker stops. It is the message of
the attempt's `CancelledError`."""
