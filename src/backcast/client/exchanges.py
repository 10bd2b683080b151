"""Each exchange with the service, written once: a generator that yields requests (or seconds to pause) and is sent the
answers. Knows nothing of how they are performed.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeAlias, TypedDict, TypeVar
from urllib.parse import quote
from uuid import UUID

from pydantic import BaseModel, TypeAdapter, ValidationError

from backcast.client.wire import (
    Ask,
    Flow,
    SubmitOptions,
    answered,
    body_of,
    json_of,
    lane_path,
    post_headers,
    read,
    read_json,
    read_line,
    run_path,
    segment,
    task_path,
)
from backcast.errors import RunError, WaitTimeout, refuse_unknown
from backcast.models import (
    CAST,
    JSON,
    Attempts,
    Batch,
    Changes,
    Counts,
    Lane,
    Limits,
    Matched,
    Operation,
    Pause,
    PauseKind,
    PauseRequest,
    Pool,
    Release,
    Run,
    Selection,
    State,
    Submission,
    TaskType,
    Why,
    Within,
    Worker,
)

T = TypeVar("T")

_HOLD = 20.0  # seconds the service may hold a poll: under the idle timeout of every common proxy (30 s and more)
_WATCHED_HOLD = 2.0  # when a person watches: an answer comes at the end only, and "queued" should not look stuck
_OUTAGE = 120.0  # seconds of silence that a wait survives once it has had an answer: longer than a restart or failover
_PAGE = 100

Progress: TypeAlias = Callable[[Run], object]
"""Called with the run each time it has been read."""


class Waiting(TypedDict, total=False):
    """How to wait: `timeout` in seconds (None: for ever); `progress` gets the run each time it has been read."""

    timeout: float | None
    progress: Progress | None


class RetryChanges(TypedDict, total=False):
    """As in `Changes`."""

    input: dict[str, JSON]
    task: str
    priority: int
    run_at: datetime
    deadline: datetime
    lane: str
    metadata: dict[str, str]


class Chosen(TypedDict, total=False):
    """The runs that match all of these; at least one is given."""

    state: State | str
    task: str
    owner: str
    batch: UUID | str


class PauseOptions(TypedDict, total=False):
    """As in `PauseRequest`."""

    reason: str
    by: str
    until: datetime | None
    running: Release


class Filters(TypedDict, total=False):
    """The runs that match all of these. `error` is a code, `text` a part of the error's detail."""

    state: State | None
    task: str | None
    owner: str | None
    batch: UUID | str | None
    lane: str | None
    worker: UUID | str | None
    error: str | None
    text: str | None
    created_after: datetime | None
    created_before: datetime | None
    ended_after: datetime | None
    ended_before: datetime | None
    metadata: Mapping[str, str]


_SUBMITTING = ("key", *SubmitOptions.__annotations__)


class PageRequest(NamedTuple):
    params: Mapping[str, str]
    left: int | None
    """Runs still wanted; None is all of them."""


class RunPage(BaseModel):
    """Runs, the newest first. A page that is not the last may be short or empty."""

    items: list[Run]
    next_cursor: str | None = None


class LogLine(BaseModel):
    """A line that the code of a run has logged or printed."""

    at: datetime
    level: str
    logger: str
    """`stdout` or `stderr`: it was printed."""
    message: str
    attempt: int | None = None


class _TaskTypes(BaseModel):
    items: list[TaskType]


class _Lanes(BaseModel):
    items: list[Lane]


class _Pools(BaseModel):
    items: list[Pool]


class _Workers(BaseModel):
    items: list[Worker]


class _Pauses(BaseModel):
    items: list[Pause]


def raise_for_state(run: Run) -> None:
    """Raise a RunError, with the run's own code, when `run` has ended without a result."""
    match run.state:
        case State.QUEUED | State.RUNNING | State.COMPLETED:
            return
        case State.FAILED:
            how = "failed"
        case State.CANCELLED:
            how = "was cancelled"
        case State.EXPIRED:
            how = "expired before a worker could take it"
    if run.error is None:
        raise RunError(f"Run {run.id} {how}.", code=run.state.value)
    raise RunError(f"Run {run.id} {how}: {run.error.detail}", code=run.error.code)


def submit(
    task: str, submission: Submission | Mapping[str, JSON], options: SubmitOptions, key: str | None, patience: float
) -> Flow[Run]:
    refuse_unknown("submit", options, _SUBMITTING)
    ask = Ask("POST", f"{task_path(task)}/runs", {}, body_of(submission, options), post_headers(key))
    return read(Run, (yield from answered(ask, patience)))


def submit_many(
    task: str,
    submissions: Iterable[Submission | Mapping[str, JSON]],
    options: SubmitOptions,
    key: str | None,
    patience: float,
) -> Flow[Batch]:
    refuse_unknown("submit_many", options, _SUBMITTING)
    body = b"".join(body_of(submission, options) + b"\n" for submission in submissions)
    return submit_lines(body, {"task": task}, key, patience)


def submit_lines(body: bytes, params: Mapping[str, str | None], key: str | None, patience: float) -> Flow[Batch]:
    given = {name: value for name, value in params.items() if value is not None}
    headers = post_headers(key) | {"Content-Type": "application/jsonl"}
    ask = Ask("POST", "/v1/batches", given, body, headers, timeout=60.0)
    return read(Batch, (yield from answered(ask, patience)))


def batch_errors(batch_id: UUID | str, patience: float) -> Flow[list[JSON]]:
    answer = yield from answered(Ask("GET", f"/v1/batches/{UUID(str(batch_id))}/errors"), patience)
    return [json.loads(line) for line in answer.content.splitlines()]


def batch(method: str, batch_id: UUID | str, verb: str, patience: float) -> Flow[Batch]:
    ask = Ask(method, f"/v1/batches/{quote(str(batch_id), safe='')}{verb}", timeout=60.0)
    return read(Batch, (yield from answered(ask, patience)))


class BatchResult(BaseModel):
    """A run of a batch: `result` if it has completed, `error` if it has no result and will have none."""

    id: UUID
    state: State
    custom_id: str | None = None
    metadata: dict[str, str] = {}
    result: JSON = None
    error: dict[str, str] | None = None


def batch_results(batch_id: UUID | str, patience: float) -> Flow[list[BatchResult]]:
    ask = Ask("GET", f"/v1/batches/{quote(str(batch_id), safe='')}/results", timeout=60.0)
    answer = yield from answered(ask, patience)
    return [read_line(BatchResult, answer, line) for line in answer.content.splitlines()]


def counts(within: Within | str, patience: float) -> Flow[Counts]:
    return read(Counts, (yield from answered(Ask("GET", "/v1/counts", {"within": Within(within)}), patience)))


def lanes(patience: float) -> Flow[Sequence[Lane]]:
    return read(_Lanes, (yield from answered(Ask("GET", "/v1/lanes"), patience))).items


def lane(method: str, name: str, limits: Limits | None, patience: float) -> Flow[Lane]:
    body = None if limits is None else limits.model_dump_json(include=set(Limits.model_fields)).encode()
    headers = {} if body is None else {"Content-Type": "application/json"}
    return read(Lane, (yield from answered(Ask(method, lane_path(name), {}, body, headers), patience)))


def lift_lane(name: str, patience: float) -> Flow[None]:
    yield from answered(Ask("DELETE", lane_path(name)), patience)


def pauses(patience: float) -> Flow[Sequence[Pause]]:
    return read(_Pauses, (yield from answered(Ask("GET", "/v1/pauses"), patience))).items


def pause(kind: PauseKind | str, name: str, options: PauseOptions, patience: float) -> Flow[Pause]:
    refuse_unknown("pause", options, PauseOptions.__annotations__)
    body = PauseRequest(**options).model_dump_json(exclude_none=True).encode()
    ask = Ask("POST", f"{_noun_path(kind, name)}/pause", {}, body, {"Content-Type": "application/json"})
    return read(Pause, (yield from answered(ask, patience)))


def resume(kind: PauseKind | str, name: str, patience: float) -> Flow[None]:
    yield from answered(Ask("POST", f"{_noun_path(kind, name)}/resume"), patience)


def _noun_path(kind: PauseKind | str, name: str) -> str:
    return f"/v1/{PauseKind(kind)}s/{segment(name)}"


def pools(patience: float) -> Flow[Sequence[Pool]]:
    return read(_Pools, (yield from answered(Ask("GET", "/v1/pools"), patience))).items


def workers(patience: float) -> Flow[Sequence[Worker]]:
    return read(_Workers, (yield from answered(Ask("GET", "/v1/workers"), patience))).items


def drain(worker_id: UUID | str, patience: float) -> Flow[None]:
    yield from answered(Ask("POST", f"/v1/workers/{UUID(str(worker_id))}/drain"), patience)


class Casting:
    """A wanted shape: how it is asked for, and how a value of it is read."""

    def __init__(self, target: Any, instructions: str | None) -> None:
        self._type = None if isinstance(target, str | Mapping) else TypeAdapter[Any](target)
        self._wanted = {"target": target if self._type is None else self._type.json_schema()}
        if instructions is not None:
            self._wanted["instructions"] = instructions

    def input(self, data: JSON) -> dict[str, JSON]:
        return {"data": data, **self._wanted}

    def value(self, value: JSON) -> Any:
        return value if self._type is None else self._type.validate_json(json.dumps(value))

    def submit_many(self, rows: Sequence[JSON], options: SubmitOptions, patience: float) -> Flow[Batch]:
        return submit_many(CAST, [self.input(row) for row in rows], options, None, patience)

    def results(self, batch_id: UUID, patience: float) -> Flow[list["CastResult[Any]"]]:
        """Those of a batch, once all of its runs have ended."""
        while True:
            states = (yield from batch("GET", batch_id, "", patience)).states
            patience = _OUTAGE
            if all(state.is_final for state in states):
                break
            yield 0.5
        return [self._result(item) for item in (yield from batch_results(batch_id, patience))]

    def _result(self, item: "BatchResult") -> "CastResult[Any]":
        if item.state is State.COMPLETED and item.error is None:
            try:
                return CastResult(item.id, self.value(item.result), None)
            except ValidationError as error:
                return CastResult(item.id, None, RunError(str(error), code="invalid_result"))
        problem = item.error or {}
        detail = problem.get("detail") or f"Run {item.id} is {item.state}."
        return CastResult(item.id, None, RunError(detail, code=problem.get("code", item.state)))


class CastResult(NamedTuple, Generic[T]):
    """What became of one row: a value, or the error of its run."""

    id: UUID
    """Of the run."""
    value: T | None
    error: RunError | None


def cast(data: JSON, target: Any, instructions: str | None, waiting: Waiting, patience: float) -> Flow[Any]:
    refuse_unknown("cast", waiting, ("instructions", *Waiting.__annotations__))
    casting = Casting(target, instructions)
    run = yield from submit(CAST, casting.input(data), {}, None, patience)
    if progress := waiting.get("progress"):
        progress(run)
    run = yield from wait(run.id, waiting, patience)
    raise_for_state(run)
    return casting.value((yield from result(run.id, patience)))


def wait(run_id: UUID | str, waiting: Waiting, patience: float) -> Flow[Run]:
    refuse_unknown("wait", waiting, Waiting.__annotations__)
    timeout, progress = waiting.get("timeout"), waiting.get("progress")
    end = math.inf if timeout is None else time.monotonic() + timeout
    hold = _WATCHED_HOLD if progress else _HOLD
    while True:
        asked = time.monotonic()
        left = max(0.0, end - asked)
        seconds = int(min(hold, left))
        headers = {"Prefer": f"wait={seconds}"} if seconds else {}
        ask = Ask("GET", run_path(run_id), headers=headers, timeout=seconds + min(10.0, max(1.0, left)))
        run = read(Run, (yield from answered(ask, min(patience, left))))
        patience = _OUTAGE
        if progress:
            progress(run)
        if run.state.is_final:
            return run
        now = time.monotonic()
        if now >= end:
            raise WaitTimeout(f"Run {run_id} is still {run.state} after {timeout:g} s; it goes on.")
        yield min(max(0.0, asked + 0.25 - now), end - now)  # four reads per second where polls are not held


def get(run_id: UUID | str, patience: float) -> Flow[Run]:
    return read(Run, (yield from answered(Ask("GET", run_path(run_id)), patience)))


def result(run_id: UUID | str, patience: float) -> Flow[JSON]:
    return read_json((yield from answered(Ask("GET", run_path(run_id) + "/result"), patience)))


def why(run_id: UUID | str, patience: float) -> Flow[Why]:
    return read(Why, (yield from answered(Ask("GET", run_path(run_id) + "/why"), patience)))


def logs(run_id: UUID | str, patience: float) -> Flow[list[LogLine]]:
    answer = yield from answered(Ask("GET", run_path(run_id) + "/logs", timeout=60.0), patience)
    return [read_line(LogLine, answer, line) for line in answer.content.splitlines()]


def operation(method: str, which: UUID | str, verb: str, patience: float) -> Flow[Operation]:
    ask = Ask(method, f"/v1/operations/{UUID(str(which))}{verb}")
    return read(Operation, (yield from answered(ask, patience)))


def many(kind: str, chosen: Chosen, key: str | None, patience: float) -> Flow[Operation]:
    refuse_unknown(f"{kind}_many", chosen, ("key", *Chosen.__annotations__))
    ask = Ask("POST", f"/v1/runs/{kind}", {}, json_of(Selection, chosen), post_headers(key))
    return read(Operation, (yield from answered(ask, patience)))


def count_many(kind: str, chosen: Chosen, patience: float) -> Flow[Matched]:
    refuse_unknown(f"count_to_{kind}", chosen, Chosen.__annotations__)
    body = json.dumps(json.loads(json_of(Selection, chosen)) | {"dry_run": True}).encode()
    return read(Matched, (yield from answered(Ask("POST", f"/v1/runs/{kind}", {}, body, post_headers(None)), patience)))


def retry_batch(batch_id: UUID | str, key: str | None, patience: float) -> Flow[Operation]:
    ask = Ask("POST", f"/v1/batches/{UUID(str(batch_id))}/retry", headers=post_headers(key))
    return read(Operation, (yield from answered(ask, patience)))


def kept_input(run_id: UUID | str, patience: float) -> Flow[JSON]:
    return read_json((yield from answered(Ask("GET", run_path(run_id) + "/input"), patience)))


def attempts(run_id: UUID | str, patience: float) -> Flow[Attempts]:
    return read(Attempts, (yield from answered(Ask("GET", run_path(run_id) + "/attempts"), patience)))


def retry(run_id: UUID | str, changes: RetryChanges, key: str | None, patience: float) -> Flow[Run]:
    refuse_unknown("retry", changes, ("key", *RetryChanges.__annotations__))
    ask = Ask("POST", run_path(run_id) + "/retry", {}, json_of(Changes, changes), post_headers(key))
    return read(Run, (yield from answered(ask, patience)))


def cancel(run_id: UUID | str, patience: float) -> Flow[Run]:
    return read(Run, (yield from answered(Ask("POST", run_path(run_id) + "/cancel"), patience)))


def task(name: str, patience: float) -> Flow[TaskType]:
    return read(TaskType, (yield from answered(Ask("GET", task_path(name)), patience)))


def tasks(patience: float) -> Flow[Sequence[TaskType]]:
    return read(_TaskTypes, (yield from answered(Ask("GET", "/v1/tasks"), patience))).items


def first_page(filters: Filters, limit: int | None) -> PageRequest | None:
    refuse_unknown("list", filters, ("limit", *Filters.__annotations__))
    return _next_page(_query(filters), limit)


def run_page(filters: Filters, limit: int, cursor: UUID | str | None, patience: float) -> Flow[RunPage]:
    refuse_unknown("page", filters, ("limit", "cursor", *Filters.__annotations__))
    params = _query(filters) | {"limit": str(limit)} | ({} if cursor is None else {"cursor": str(cursor)})
    return read(RunPage, (yield from answered(Ask("GET", "/v1/runs", params), patience)))


def _query(filters: Filters) -> dict[str, str]:
    given: dict[str, object] = {name: value for name, value in filters.items() if name != "metadata"}
    given |= {f"metadata.{name}": value for name, value in filters.get("metadata", {}).items()}
    return {name: _written(value) for name, value in given.items() if value is not None}


def _written(value: object) -> str:
    """A filter in a query; a time without an offset is this machine's."""
    return value.astimezone().isoformat() if isinstance(value, datetime) else str(value)


def _next_page(params: Mapping[str, str], left: int | None) -> PageRequest | None:
    if left is not None and left <= 0:
        return None
    return PageRequest({**params, "limit": str(_PAGE if left is None else min(left, _PAGE))}, left)


def page(page: PageRequest, patience: float) -> Flow[tuple[Sequence[Run], PageRequest | None]]:
    got = read(RunPage, (yield from answered(Ask("GET", "/v1/runs", page.params), patience)))
    if got.next_cursor is None:
        return got.items, None
    left = None if page.left is None else page.left - len(got.items)
    return got.items, _next_page({**page.params, "cursor": got.next_cursor}, left)
