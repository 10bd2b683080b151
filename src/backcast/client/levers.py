"""Exchanges about tasks, lanes, pools and workers: look at them, limit, pause, resume, drain."""

from collections.abc import Sequence
from datetime import datetime
from typing import TypedDict, Unpack
from uuid import UUID

from backcast.client import wire
from backcast.client.wire import Ask, Flow, named, path, read, read_items
from backcast.errors import refuse_unknown
from backcast.models import (
    Counts,
    Lane,
    Limits,
    Pause,
    PauseKind,
    PauseRequest,
    Pool,
    Release,
    TaskType,
    Within,
    Worker,
)


class PauseOptions(TypedDict, total=False):
    """As in `PauseRequest`."""

    reason: str
    by: str
    until: datetime | None
    running: Release


def task(name: str) -> Flow[TaskType]:
    """A task, with its schemas and its load."""
    return read(TaskType, (yield from wire.get(named("tasks", name))))


def tasks() -> Flow[Sequence[TaskType]]:
    """The tasks that can be run."""
    return read_items(TaskType, (yield from wire.get("/v1/tasks")))


def lanes() -> Flow[Sequence[Lane]]:
    """The lanes that have limits or are paused."""
    return read_items(Lane, (yield from wire.get("/v1/lanes")))


def lane(name: str) -> Flow[Lane]:
    """A lane: its limits, and its runs by state."""
    return read(Lane, (yield from wire.get(named("lanes", name))))


def limit_lane(name: str, limits: Limits) -> Flow[Lane]:
    """Replace the limits of a lane."""
    body = limits.model_dump_json(include=set(Limits.model_fields)).encode()
    return read(Lane, (yield wire.json_request("PUT", named("lanes", name), body)))


def lift_lane(name: str) -> Flow[None]:
    """Lift the limits of a lane; runs that wait for the lane go on."""
    yield Ask("DELETE", named("lanes", name))


def pauses() -> Flow[Sequence[Pause]]:
    """What is paused."""
    return read_items(Pause, (yield from wire.get("/v1/pauses")))


def pause(kind: PauseKind | str, name: str, **options: Unpack[PauseOptions]) -> Flow[Pause]:
    """Start nothing new of a `"task"`, `"lane"` or `"pool"`, of what is queued already neither."""
    refuse_unknown("pause", options, PauseOptions.__annotations__)
    body = wire.body_of(PauseRequest, options)
    return read(Pause, (yield from wire.post(named(f"{PauseKind(kind)}s", name, "/pause"), body)))


def resume(kind: PauseKind | str, name: str) -> Flow[None]:
    """End a pause; what is not paused stays as it is."""
    yield from wire.post(named(f"{PauseKind(kind)}s", name, "/resume"))


def counts(within: Within | str = Within.HOUR) -> Flow[Counts]:
    """How many runs were submitted and have ended in the last `"hour"` or `"day"`."""
    return read(Counts, (yield Ask("GET", "/v1/counts", {"within": Within(within)})))


def pools() -> Flow[Sequence[Pool]]:
    """The pools, with what waits in them and who works on it."""
    return read_items(Pool, (yield from wire.get("/v1/pools")))


def workers() -> Flow[Sequence[Worker]]:
    """The workers, the newest first; those that are silent are listed until they are removed."""
    return read_items(Worker, (yield from wire.get("/v1/workers")))


def drain(worker_id: UUID | str) -> Flow[None]:
    """Ask a worker to claim nothing more, and to end once its runs have."""
    yield from wire.post(path("workers", worker_id, "/drain"))
