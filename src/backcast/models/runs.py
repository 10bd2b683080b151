"""A run: its submission, its state, its attempts, and what it waits for."""

from datetime import datetime
from enum import StrEnum
from typing import Literal
from uuid import UUID

from pydantic import Field, ValidationInfo, field_validator

from backcast.models.lanes import Pause
from backcast.models.values import JSON, Figure, Input, Metadata, Moment, Name, Noun, Priority, Problem

LOGS_KEPT = 10
"""Attempts of a run whose logs are kept, the latest ones."""


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


class Submission(Noun):
    """A request to run a task."""

    input: Input = Field(default={})
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
    metadata: Metadata = Field(default={})
    """The caller's own labels, at most 32, and 16 KiB of JSON in all; returned with the run, not read by backcast."""

    @field_validator("deadline")
    @classmethod
    def _is_after_run_at(cls, deadline: datetime | None, info: ValidationInfo) -> datetime | None:
        run_at: datetime | None = info.data.get("run_at")
        if deadline is not None and run_at is not None and deadline <= run_at:
            raise ValueError("the deadline is not after run_at, so the run could never start")
        return deadline


class Changes(Noun):
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


class Progress(Noun):
    """How far a run has come, as its task has reported last."""

    fraction: float | None = None
    """The part that is done, from 0 to 1."""
    message: str = ""
    at: datetime
    attempt: int
    """The attempt that has reported it."""


class Run(Noun):
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
    retried_by: list[UUID] = Field(default=[])
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
    metadata: dict[str, str] = Field(default={})
    created_at: datetime
    run_at: datetime
    deadline: datetime | None = None
    started_at: datetime | None = None
    """Start of the latest attempt."""
    finished_at: datetime | None = None


class Attempt(Noun):
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


class Attempts(Noun):
    """The attempts of a run, the oldest first. Of those that did not succeed, the newest 10 are kept."""

    items: list[Attempt]
    left_out: int
    """How many earlier ones are no longer kept."""


class Why(Noun):
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
