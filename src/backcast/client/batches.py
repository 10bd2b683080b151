"""Exchanges about batches: runs that are submitted together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Unpack
from uuid import UUID

from pydantic import BaseModel

from backcast.client import wire
from backcast.client.runs import SubmitOptions, submitted
from backcast.client.wire import Ask, Flow, path, read
from backcast.errors import refuse_unknown
from backcast.models import JSON, Batch, Operation, State, Submission


class BatchResult(BaseModel):
    """A run of a batch: `result` if it has completed, `error` if it has no result and will have none."""

    id: UUID
    state: State
    custom_id: str | None = None
    metadata: dict[str, str] = {}
    result: JSON = None
    error: dict[str, str] | None = None


def submit_many(
    task: str,
    submissions: Iterable[Submission | Mapping[str, JSON]],
    *,
    key: str | None = None,
    **options: Unpack[SubmitOptions],
) -> Flow[Batch]:
    """Queue a run of `task` for each submission, all or none, with one request; `options` hold for every one."""
    refuse_unknown("submit_many", options, ("key", *SubmitOptions.__annotations__))
    body = b"".join(submitted(submission, options) + b"\n" for submission in submissions)
    return (yield from submit_lines(body, task=task, key=key))


def submit_lines(
    lines: bytes,
    *,
    task: str | None = None,
    owner: str | None = None,
    on_error: Literal["reject", "skip"] | None = None,
    key: str | None = None,
) -> Flow[Batch]:
    """Queue the runs of JSON Lines, as `POST /v1/batches` takes them; `task` and `owner` hold for lines that name none.
    `skip` goes on without the wrong lines: `batch_errors` has the reasons."""
    given = {"task": task, "owner": owner, "on_error": on_error}
    ask = wire.once("/v1/batches", lines, key)
    params = {name: value for name, value in given.items() if value is not None}
    headers = {**ask.headers, "Content-Type": "application/jsonl"}
    return read(Batch, (yield ask._replace(params=params, headers=headers, timeout=60.0)))


def get(batch_id: UUID | str) -> Flow[Batch]:
    """A batch, with its runs counted by state; `list(batch=…)` has the runs."""
    return read(Batch, (yield Ask("GET", path("batches", batch_id), timeout=60.0)))


def latest() -> Flow[Sequence[Batch]]:
    """The newest batches, at most 100; the older of them may be without their states."""
    return wire.read_items(Batch, (yield from wire.get("/v1/batches")))


def errors(batch_id: UUID | str) -> Flow[list[JSON]]:
    """The errors of the first 1,000 skipped lines: `line` (from 1), `custom_id`, `code`, `detail`, `errors`."""
    return wire.read_json_lines((yield from wire.get(path("batches", batch_id, "/errors"))))


def results(batch_id: UUID | str) -> Flow[list[BatchResult]]:
    """The runs of a batch with their results, in the order of submission, ended or not."""
    return wire.read_lines(BatchResult, (yield Ask("GET", path("batches", batch_id, "/results"), timeout=60.0)))


def cancel(batch_id: UUID | str) -> Flow[Batch]:
    """Cancel every run of the batch that has not ended."""
    return read(Batch, (yield Ask("POST", path("batches", batch_id, "/cancel"), timeout=60.0)))


def retry(batch_id: UUID | str, *, key: str | None = None) -> Flow[Operation]:
    """Repeat the failed and expired runs of a batch, as a batch of their own: the operation's `batch_id`."""
    return read(Operation, (yield wire.once(path("batches", batch_id, "/retry"), None, key)))
