"""Writes a change of a run's state as an event for Prefect's server, with only the fields that the server reads or its
pages show. Knows the two sources of a change (an engine, or the ledger if no engine has published it), not how events
are sent.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Self
from uuid import UUID, uuid5

from backcast.history.cleaning import NAME, TEXT, text
from backcast.ledger.history import Entry
from backcast.models import JSON

RESOURCE = "prefect.task-run."
PARAMETERS = 100
"""Names of parameters that are shown."""


def state_type(state: str) -> str:
    """Prefect's type for a state of the ledger. It has none for a run that was not started in time."""
    return "CANCELLED" if state == "expired" else state.upper()


@dataclass(frozen=True, slots=True)
class Change:
    """Values only, so that it can be kept while the run goes on. Of two changes of a run the server keeps the later."""

    run: UUID
    task: str
    label: str
    """The run's name on the page: the task's name, or the one that its `task_run_name` makes."""
    type: str
    """Prefect's state type: RUNNING, COMPLETED, …"""
    name: str
    """Prefect's name for the state: AwaitingRetry, TimedOut, …"""
    message: str | None
    at: datetime
    attempts: int
    due: datetime
    parameters: Iterable[str] = ()
    """Names only."""
    policy: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    """The task's retry policy, in Prefect's terms."""
    version: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    busy: timedelta = timedelta()
    scheduled_for: datetime | None = None

    @classmethod
    def from_ledger(cls, run: Entry) -> Self:
        scheduled = run.state == "scheduled"
        start = None if scheduled else run.started_at or run.at
        kind = state_type(run.state)
        return cls(
            run=run.id,
            task=run.task,
            label=run.task,
            type=kind,
            name=kind.capitalize(),
            message=f"Expired: {run.message or 'it was not started before its deadline.'}"
            if run.state == "expired"
            else run.message,
            at=run.reported_at or run.at,
            attempts=run.attempts,
            due=run.due,
            parameters=run.parameters,
            started_at=start,
            ended_at=None if scheduled else run.at,
            busy=run.at - start if start else timedelta(),
            scheduled_for=run.due if scheduled else None,
        )


def event(change: Change, tag: str | None = None) -> bytes:
    """The JSON that `POST /api/events` takes, in a list. The run gets the tag in Prefect."""
    at = change.at.isoformat()
    message = change.message and change.message[:TEXT]
    name, label, task = text(change.name, NAME), change.label[:NAME], change.task[:NAME]
    shown: dict[str, JSON] = {
        "name": label,
        "task_key": task,
        "dynamic_key": f"{task}-{change.run}",
        "empirical_policy": change.policy,
        "task_inputs": {each[:NAME]: [] for each in islice(change.parameters, PARAMETERS)},
        "run_count": change.attempts,
        "expected_start_time": change.due.isoformat(),
        "total_run_time": change.busy.total_seconds(),
        "tags": [tag] if tag else [],
    }
    if change.version is not None:
        shown["task_version"] = change.version[:NAME]
    if change.started_at is not None:
        shown["start_time"] = change.started_at.isoformat()
    if change.ended_at is not None:
        shown["end_time"] = change.ended_at.isoformat()
    details = {"scheduled_time": change.scheduled_for.isoformat()} if change.scheduled_for else {}
    body: dict[str, JSON] = {
        # Becomes the state's id. A change that is published again has the same id: the server's recorder ignores it.
        # With another id it would be the run's second state of one time: the recorder fails on that, and stops.
        "id": str(uuid5(change.run, f"{name} {at}")),
        "occurred": at,
        "event": f"{RESOURCE}{name}",
        "resource": {
            "prefect.resource.id": f"{RESOURCE}{change.run}",
            "prefect.resource.name": label,
            "prefect.orchestration": "client",  # otherwise the server's recorder skips it
            "prefect.state-type": change.type,
            "prefect.state-name": name,
            "prefect.state-message": message or "",
            "prefect.state-timestamp": at,
            "prefect.run-count": str(change.attempts),
        },
        "payload": {
            "intended": {"from": None, "to": change.type},
            "initial_state": None,
            "validated_state": {
                "type": change.type,
                "name": name,
                "message": message,
                "state_details": details,
                "data": None,
            },
            "task_run": shown,
        },
    }
    return json.dumps(body, separators=(",", ":")).encode()
