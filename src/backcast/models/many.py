"""Many runs at once: batches, the filters that choose runs, and operations with those."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, Strict

from backcast.models.runs import State
from backcast.models.values import JSON, METADATA, Moment, Name, Noun, Text


class Batch(Noun):
    """Runs that were submitted together."""

    id: UUID
    owner: str
    size: int
    created_at: datetime
    states: dict[State, int] = Field(default={})
    """The number of its runs in each state; removed runs are not counted."""
    skipped: int = 0
    """Wrong lines that made no run, with `on_error=skip`; `GET /v1/batches/{id}/errors` has the reasons."""
    operation_id: UUID | None = None
    """Of the retry of a batch: the operation that is still adding runs to it. None: it has all of them."""


LABELS = 5
"""Labels by which runs can be filtered at once."""


Words = Annotated[Text, Field(min_length=1, max_length=200)]
"""What a filter looks for in a text."""


class _Filters(Noun):
    task: Name | None = None
    owner: Name | None = None
    batch: UUID | None = None
    lane: Name | None = None
    worker: UUID | None = None
    error: Words | None = None
    """The code of the run's error."""
    text: Words | None = None
    """A part of the detail of its error, in upper or lower case."""
    created_after: Moment | None = None
    created_before: Moment | None = None
    metadata: dict[Words, Annotated[Text, Field(max_length=METADATA)]] = Field(default={}, max_length=LABELS)
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


class Matched(Noun):
    """The answer to a dry run."""

    runs: int
    """Runs that match at this moment."""
    more: bool
    """There are, or may be, more of them: `runs` is exact up to 100,000."""


class Operation(Noun):
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
