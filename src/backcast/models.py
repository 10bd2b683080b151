"""The nouns: run, task type, submission and others. Values only; no I/O, no HTTP."""

import hashlib
import json
import random
import re
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from backcast import names
from backcast.errors import BackcastError

JSON = Any
"""A plain JSON value: None, bool, int, float, str, list, dict with string keys."""


WARNINGS = "x-warnings"
"""The keyword of an input schema with the warnings of its task type: an annotation, so the ledger keeps them there."""

LOGS_KEPT = 10
"""Attempts of a run whose logs are kept, the latest ones."""


def log_key(run_id: UUID, fence: int) -> str:
    """The key of the object with the log of an attempt, as JSON lines."""
    return f"logs/{run_id}/{fence}.jsonl"


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


Name = Annotated[str, AfterValidator(names.check), WithJsonSchema({"type": "string", **names.SCHEMA})]
"""The name of a task, a lane or an owner."""


IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,200}")
KEY_RULE = "An Idempotency-Key has 1 to 200 printable ASCII characters."


def _text_only(value: object) -> object:
    if isinstance(value, datetime) or (isinstance(value, str) and _RFC_3339.fullmatch(value)):
        return value
    why = "with date, time and offset" if isinstance(value, str) else "as a number may mean too many things"
    raise ValueError(f"a time is written as 2030-01-31T08:00:00Z, {why}")


def _in_range(value: datetime) -> datetime:
    """In UTC. The driver sends the first and the last microsecond as infinity, of which PostgreSQL has no age."""
    try:
        return min(max(value.astimezone(UTC), _FIRST), _LAST)
    except OverflowError:
        raise ValueError("the time is outside of the years 1 to 9999 in UTC") from None


_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d([.,]\d+)?)?([Zz]|[+-]\d\d:?\d\d)")
_FIRST = datetime.min.replace(tzinfo=UTC, microsecond=1)
_LAST = datetime.max.replace(tzinfo=UTC, microsecond=999_998)
Moment = Annotated[AwareDatetime, BeforeValidator(_text_only), AfterValidator(_in_range)]


def _number(value: object) -> object:
    if isinstance(value, bool | str):
        raise ValueError("a number is wanted")  # pydantic would take true for 1
    return value


_Number = BeforeValidator(_number)
"""After the bounds of its type, which then are part of the JSON Schema."""


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


Figure = Annotated[float, AfterValidator(_rounded)]
"""An age, a duration or a pace, in three digits."""
METADATA = 16 * 1024
"""Bytes of JSON that the metadata of a run may have in all: it is part of every answer about the run."""


def _bounded(metadata: dict[str, str]) -> dict[str, str]:
    if len(json.dumps(metadata, ensure_ascii=False).encode(errors="replace")) > METADATA:
        raise ValueError(f"the metadata may have {METADATA} bytes of JSON in all")
    return metadata


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


Input = dict[str, JSON]
Priority = Annotated[int, Field(ge=-100, le=100), _Number]
Metadata = Annotated[dict[str, str], Field(max_length=32), AfterValidator(_bounded)]


class Submission(_Noun):
    """A request to run a task."""

    input: Input = {}
    """The task's parameters by name; checked against the task's input schema."""
    owner: Name = "default"
    """The party that the run belongs to; owners take turns in the queue."""
    priority: Priority = 0
    """Higher runs first, among the runs of the same owner."""
    run_at: Moment | None = None
    """Not before this time (RFC 3339, with an offset); a past one means now."""
    deadline: Moment | None = None
    """A run that still waits at this time, for a slot or for another attempt, expires; a running one goes on. It must
    lie in the future, and after `run_at`."""
    lane: Name | None = None
    """The lane of the run, such as a provider's quota; it may have limits. None: the task's own lane, if any."""
    metadata: Metadata = {}
    """The caller's own labels, at most 32, and 16 KiB of JSON in all; returned with the run, not read by backcast."""

    @field_validator("deadline")
    @classmethod
    def _is_after_run_at(cls, deadline: datetime | None, info: ValidationInfo) -> datetime | None:
        run_at: datetime | None = info.data.get("run_at")
        if deadline is not None and run_at is not None and deadline <= run_at:
            raise ValueError("the deadline is not after run_at, so the run could never start")
        return deadline


class Changes(_Noun):
    """The things in which a retry differs from the run that it repeats. Each one that is absent or null is as in that
    run; but `run_at` and `deadline` are not taken over, and nor is the lane if the task is another one."""

    input: Input | None = None
    """The whole new input."""
    task: Name | None = None
    priority: Priority | None = None
    run_at: Moment | None = None
    deadline: Moment | None = None
    lane: Name | None = None
    metadata: Metadata | None = None


class Progress(_Noun):
    """How far a run has come, as its task has reported last."""

    fraction: float | None = None
    """The part that is done, from 0 to 1."""
    message: str = ""
    at: datetime
    attempt: int
    """The attempt that has reported it."""


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
    retry_of: UUID | None = None
    """The run that this one repeats."""
    retried_by: list[UUID] = []
    """The runs that repeat this one, the latest 20 of them, the newest last."""
    attempts: int
    """Attempts that have been started, the present one included."""
    error: Problem | None = None
    """Set when the state is failed, or when the last attempt failed and another one will be made."""
    usage: dict[str, JSON] | None = None
    """The cost of the run so far, failed attempts included: `model` (its name), `input_tokens`, `output_tokens`."""
    progress: Progress | None = None
    """As its task has reported it last."""
    why: (
        Literal["paused", "lane", "same_value", "no_worker", "unknown_version", "retry", "scheduled", "ready"] | None
    ) = None
    """What it waits for, in a word, if it waits; `GET /v1/runs/{id}/why` explains it."""
    metadata: dict[str, str] = {}
    created_at: datetime
    run_at: datetime
    deadline: datetime | None = None
    started_at: datetime | None = None
    """Start of the latest attempt."""
    finished_at: datetime | None = None


class Attempt(_Noun):
    """One attempt of a run, as callers see it."""

    number: int
    """From 1, in the order of their ends."""
    fence: int
    """The number of the claim under which it was made. Retries that follow at once have the same."""
    outcome: Literal["running", "succeeded", "retrying", "failed", "timed_out", "lost", "released", "cancelled"]
    """`retrying`: it failed, and another one follows; so may one that is `timed_out`. `lost`: with its worker.
    `released`: its worker or its executor stopped first."""
    counts: bool = True
    """Whether it is one of the `attempts` of the run: one that was released is not, nor one that was lost by no fault
    of the run."""
    started_at: datetime | None = None
    ended_at: datetime | None = None
    worker_id: UUID | None = None
    host: str | None = None
    """Of the worker, if it is known."""
    error: Problem | None = None
    traceback: str | None = None
    """The end of Python's, at most 8 KiB; without the values of keys and passwords that the worker knows."""
    retry_delay: float | None = None
    """Seconds until the next one is due; None: there is none, or it does not wait."""
    usage: dict[str, JSON] | None = None
    """Its tokens, as in the run. Retries that follow at once share those of the last."""


class Attempts(_Noun):
    """The attempts of a run, the oldest first. Of those that did not succeed, the newest 10 are kept."""

    items: list[Attempt]
    left_out: int
    """How many earlier ones are no longer kept."""


class Why(_Noun):
    """Where a run is, and what it waits for. Fields that the code does not need are left out."""

    code: Literal[
        "no_worker",
        "paused",
        "lane_full",
        "lane_rate",
        "behind",
        "scheduled",
        "retry_wait",
        "same_value",
        "unknown_version",
        "released",
        "ready",
        "running",
        "stopping",
        "completed",
        "failed",
        "cancelled",
        "expired",
    ]
    sentence: str
    since: datetime | None = None
    """When that began, if it is known."""
    until: datetime | None = None
    """When the wait is over at the latest, if that is known."""
    estimate_seconds: Figure | None = None
    """Until it starts, at the pace of the last minute; absent when nothing has ended lately."""
    pool: str | None = None
    last_seen_at: datetime | None = None
    """When a worker that serves the task was last alive."""
    slots: int | None = None
    """Of the live workers that serve the task."""
    runs_before: int | None = None
    """Of the same owner, which start earlier; at most 10,000 are counted."""
    owners: int | None = None
    """Others whose runs take turns with those of this owner; at most 1,000 are counted."""
    lane: str | None = None
    max_running: int | None = None
    running: int | None = None
    """Runs that take a place in the lane."""
    max_per_minute: float | None = None
    pause: "Pause | None" = None
    attempt: int | None = None
    """The number of the present or the last attempt, of `attempts`."""
    attempts: int | None = None
    """How many the task allows, unless some are lost."""
    error: Problem | None = None
    run_id: UUID | None = None
    """The run whose value it waits for."""
    worker_id: UUID | None = None
    host: str | None = None
    progress: Progress | None = None
    waited_seconds: Figure | None = None
    """From its submission to the start of its last attempt, or to its end if it never started."""
    ran_seconds: Figure | None = None
    """In its last attempt."""


class Load(_Noun):
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


class Worker(_Noun):
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
    warnings: list[str] = []
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


class Within(StrEnum):
    """A time up to now."""

    HOUR = "hour"
    DAY = "day"


class TaskCounts(_Noun):
    """The runs of one task; as in `Counts`."""

    task: str
    submitted: int
    states: dict[State, int]


class ErrorCount(_Noun):
    """How many runs of a task failed with a code."""

    task: str
    code: str
    runs: int


class Flow(_Noun):
    """What came in and went out in a minute, or in half an hour."""

    at: datetime
    """Its beginning."""
    submitted: int
    ended: dict[State, int]


class Counts(_Noun):
    """How many runs were submitted and have ended lately."""

    since: datetime
    """The beginning of a minute, or of half an hour."""
    until: datetime
    approximate: bool
    """Whether the numbers are estimated from a sample, as there are too many runs to be counted. A rare task or error
    may be missing then."""
    submitted: int
    states: dict[State, int]
    """The runs that ended since then, by state; and those that were submitted since then and have not ended."""
    tasks: list[TaskCounts]
    """Those with the most runs first, at most 100."""
    errors: list[ErrorCount]
    """Of the failed runs: the most frequent first, at most 100."""
    flow: list[Flow]
    """By minute of the last hour, or by half an hour of the last day, the oldest first. The last one is not over."""


MOST = 1_000_000
"""The highest limit of a lane."""
SLOWEST = 0.000001
"""The lowest rate of a lane, about one run in two years: computing with a lower one would underflow."""


class Limits(_Noun):
    """The limits of a lane; at least one of the two is set."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": [name], "not": {"properties": {name: {"type": "null"}}}}
                for name in ("max_running", "max_per_minute")
            ]
        }
    )

    max_running: Annotated[int, Field(ge=0, le=MOST), _Number] | None = None
    """Runs of the lane that may run at the same time; 0 holds them all."""
    max_per_minute: Annotated[float, Field(ge=SLOWEST, le=MOST), _Number] | None = None
    """Attempts that may start in a minute, retries included."""


class PauseKind(StrEnum):
    """What can be paused."""

    TASK = "task"
    LANE = "lane"
    POOL = "pool"


class Release(StrEnum):
    """What becomes of runs that have begun when their task, lane or pool is paused."""

    CONTINUE = "continue"
    RELEASE = "release"


class PauseRequest(_Noun):
    """A request to start nothing new of a task, a lane or a pool."""

    reason: Annotated[str, Field(max_length=300)] = ""
    """Shown to everybody who asks why a run waits."""
    by: Annotated[str, Field(max_length=100)] = ""
    """Who asks for it."""
    until: Moment | None = None
    """When it ends by itself; it must lie in the future. None: when it is resumed."""
    running: Release = Release.CONTINUE
    """`release` also stops the runs that have begun, as when a worker drains: they begin again once it has ended, and
    no attempt is counted."""


class Pause(_Noun):
    """A pause of a task, a lane or a pool."""

    kind: PauseKind
    name: str
    reason: str
    by: str
    since: datetime
    until: datetime | None = None
    running: Release


class Lane(_Noun):
    """A lane that has limits or is paused, and its runs; each number is counted up to 10,000."""

    name: str
    max_running: int | None = None
    max_per_minute: float | None = None
    running: int
    queued: int
    """Its runs that may start as soon as a slot is free."""
    held: int
    """Its runs that wait for the lane: for a place, or for the end of a pause."""
    oldest_age_seconds: Figure | None = None
    """How long the oldest of the queued and held ones that are counted has waited since it could have started."""
    per_minute: Figure | None = None
    """Runs that it let start in the last minute, about; None if it has no limits."""
    paused: Pause | None = None
    problem: str | None = None
    """What is wrong with its limits, if they were not set by this interface."""


class Batch(_Noun):
    """Runs that were submitted together."""

    id: UUID
    owner: str
    size: int
    created_at: datetime
    states: dict[State, int] = {}
    """The number of its runs in each state; removed runs are not counted."""
    skipped: int = 0
    """Wrong lines that made no run, with `on_error=skip`; `GET /v1/batches/{id}/errors` has the reasons."""
    operation_id: UUID | None = None
    """Of the retry of a batch: the operation that is still adding runs to it. None: it has all of them."""


LABELS = 5
"""Labels by which runs can be filtered at once."""
_Words = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]


class _Filters(_Noun):
    task: Name | None = None
    owner: Name | None = None
    batch: UUID | None = None
    lane: Name | None = None
    worker: UUID | None = None
    error: _Words | None = None
    """The code of the run's error."""
    text: _Words | None = None
    """A part of the detail of its error, in upper or lower case."""
    created_after: Moment | None = None
    created_before: Moment | None = None
    metadata: dict[_Words, Annotated[str, Field(max_length=METADATA, pattern=r"^[^\x00]*$")]] = Field(
        default={}, max_length=LABELS
    )
    """Labels that the run has."""


class _EndedFilters(_Filters):
    ended_after: Moment | None = None
    ended_before: Moment | None = None


class Selection(_EndedFilters):
    """The runs that match every filter which is set."""

    state: State | None = None


def _at_least_one(*models: type[BaseModel]) -> JSON:
    """For the JSON Schema of a body: one filter is set."""
    names = [name for model in models for name in model.model_fields]
    return {
        "anyOf": [
            {
                "required": [name],
                "properties": {name: {"minProperties": 1} if name == "metadata" else {"not": {"type": "null"}}},
            }
            for name in [*names, "state"]
        ]
    }


class RetryMany(_EndedFilters):
    """The ended runs to be repeated: those that match every filter which is set, at least one."""

    model_config = ConfigDict(json_schema_extra=_at_least_one(_EndedFilters))

    state: Literal["completed", "failed", "cancelled", "expired"] | None = None
    """None: failed and expired."""
    dry_run: Annotated[bool, Strict()] = False
    """Only count the runs that match."""


class CancelMany(_Filters):
    """The runs to be cancelled: those that match every filter which is set, at least one."""

    model_config = ConfigDict(json_schema_extra=_at_least_one(_Filters))

    state: Literal["queued", "running"] | None = None
    """None: both."""
    dry_run: Annotated[bool, Strict()] = False
    """Only count the runs that match."""


class Matched(_Noun):
    """The answer to a dry run."""

    runs: int
    """Runs that match at this moment."""
    more: bool
    """There are, or may be, more of them: `runs` is exact up to 100,000."""


class Operation(_Noun):
    """What is being done with many runs, a page after the other: ask again to see how far it has come."""

    id: UUID
    kind: Literal["retry", "cancel"]
    state: Literal["running", "completed", "cancelled"]
    """Cancelled: it was stopped; what it had done stays done."""
    filter: Selection
    batch_id: UUID | None = None
    """Of the retry of a batch: the batch of the runs that it makes, which grows until it is completed."""
    done: int
    """Runs that are repeated; or cancelled, or asked to stop."""
    skipped: int
    """Retry: runs that were removed before their turn. Cancel: runs that something else was changing; it comes back to
    them before it is completed."""
    failed: int
    """Runs that can't be repeated, because their large input is no longer stored."""
    created_at: datetime
    """Runs that were submitted, or have ended, after this time are left alone: by a cancel, or by a retry."""
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Succeeded:
    """An attempt that returned a value; `body` is its plain JSON in UTF-8."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt after which no other one is made."""

    problem: Problem
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Retry:
    """An attempt that failed, to be made again after `delay` seconds; `retries` counts the retries with that one."""

    problem: Problem
    delay: float
    retries: int
    behind: str | None = None
    """The flight to wait for: another run computes the same value."""
    route: str = ""
    """The route to the workers that can do the run: see `ledger.routing`."""
    counts: bool = False
    """Whether it counts against `max_attempts`, beside its retries: it has ended its executor, or its result can't be
    stored."""
    traceback: str = ""

    @classmethod
    def after_outage(cls, error: BackcastError, retries: int, *, counts: bool = False) -> Self:
        """Spread, or all runs that met the same outage come back at the same moment."""
        return cls(Problem.from_error(error), random.uniform(2.5, 7.5), retries, counts=counts)  # noqa: S311


@dataclass(frozen=True, slots=True)
class Tried:
    """A failed attempt that was followed by another one at once, under the same claim."""

    problem: Problem
    traceback: str
    since: float
    """Seconds between the claim and its start, and its end: about, as the executor does not know the claim."""
    until: float


AttemptResult = Succeeded | Failed | Retry
"""The result of an attempt of a run."""
Reason = Literal["cancelled", "lost", "released"]
"""Why an attempt was stopped: its caller asked, another worker has the run, or this worker stops. It is the message of
the attempt's `CancelledError`."""
