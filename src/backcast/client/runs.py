"""Exchanges about one run: submit, wait, read, retry, cancel."""

import math
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TypeAlias, TypedDict, Unpack
from uuid import UUID

from pydantic import BaseModel

from backcast.client import wire
from backcast.client.wire import Ask, Flow, named, path, read, read_json
from backcast.errors import RunError, WaitTimeout, refuse_unknown
from backcast.models import JSON, Attempts, Changes, Run, State, Submission, Why

_HOLD = 20.0  # seconds the service may hold a poll: under the idle timeout of every common proxy (30 s and more)
_WATCHED_HOLD = 2.0  # when a person watches: an answer comes at the end only, and "queued" should not look stuck
OUTAGE = 120.0
"""Seconds of silence that a wait survives once it has had an answer: longer than a restart or failover."""

Progress: TypeAlias = Callable[[Run], object]
"""Called with the run each time it has been read."""


class SubmitOptions(TypedDict, total=False):
    """The fields of a `Submission` beside its input."""

    owner: str
    priority: int
    run_at: datetime | None
    deadline: datetime | None
    lane: str | None
    metadata: dict[str, str]


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


class LogLine(BaseModel):
    """A line that the code of a run has logged or printed."""

    at: datetime
    level: str
    logger: str
    """`stdout` or `stderr`: it was printed."""
    message: str
    attempt: int | None = None


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
    task: str,
    submission: Submission | Mapping[str, JSON],
    *,
    key: str | None = None,
    **options: Unpack[SubmitOptions],
) -> Flow[Run]:
    """Queue a run of `task`. A mapping is the task's input; `options` set the other fields of the submission.

    `key` is the Idempotency-Key; one is made up when none is given.
    """
    refuse_unknown("submit", options, ("key", *SubmitOptions.__annotations__))
    return read(Run, (yield wire.once(named("tasks", task, "/runs"), submitted(submission, options), key)))


def submitted(submission: Submission | Mapping[str, JSON], given: SubmitOptions) -> bytes:
    """The body of a submission. Raises `InvalidInput`."""
    with wire.valid("The input"):
        if not isinstance(submission, Submission):
            submission = Submission(input=dict(submission), **given)
        elif given:
            submission = Submission.model_validate({**dict(submission), **given})
        options = submission.model_dump(mode="json", exclude_defaults=True, exclude={"input"})
        return wire.encoded(options | {"input": submission.input})


def get(run_id: UUID | str) -> Flow[Run]:
    """A run as it is now."""
    return read(Run, (yield from wire.get(path("runs", run_id))))


def result(run_id: UUID | str) -> Flow[JSON]:
    """The run's result.

    Raises:
        NotFinished, NoResult, ResultGone: there is none yet, there will be none, there was one.
    """
    return read_json((yield from wire.get(path("runs", run_id, "/result"))))


def wait(run_id: UUID | str, **waiting: Unpack[Waiting]) -> Flow[Run]:
    """The run once it has ended, however it ended; `raise_for_state` turns a bad end into an error.

    Raises:
        WaitTimeout: it takes longer than `timeout` seconds.
    """
    refuse_unknown("wait", waiting, Waiting.__annotations__)
    timeout, progress = waiting.get("timeout"), waiting.get("progress")
    end = math.inf if timeout is None else time.monotonic() + timeout
    hold, patience = _WATCHED_HOLD if progress else _HOLD, None
    while True:
        asked = time.monotonic()
        left = max(0.0, end - asked)
        seconds = int(min(hold, left))
        headers = {"Prefer": f"wait={seconds}"} if seconds else {}
        longest = seconds + min(10.0, max(1.0, left))
        got = yield Ask("GET", path("runs", run_id), {}, None, headers, longest, patience, within=left)
        run, patience = read(Run, got), OUTAGE
        if progress:
            progress(run)
        if run.state.is_final:
            return run
        now = time.monotonic()
        if now >= end:
            raise WaitTimeout(f"Run {run_id} is still {run.state} after {timeout:g} s; it goes on.")
        yield min(max(0.0, asked + 0.25 - now), end - now)  # four reads per second where polls are not held


def why(run_id: UUID | str) -> Flow[Why]:
    """Where a run is, and what it waits for."""
    return read(Why, (yield from wire.get(path("runs", run_id, "/why"))))


def logs(run_id: UUID | str) -> Flow[list[LogLine]]:
    """What the code of a run has logged and printed so far; lines come about 10 s late."""
    answer = yield Ask("GET", path("runs", run_id, "/logs"), timeout=60.0)
    return wire.read_lines(LogLine, answer)


def kept_input(run_id: UUID | str) -> Flow[JSON]:
    """The input that a run was submitted with."""
    return read_json((yield from wire.get(path("runs", run_id, "/input"))))


def attempts(run_id: UUID | str) -> Flow[Attempts]:
    """The attempts of a run, and how each ended; those that did not succeed are kept, the newest ten."""
    return read(Attempts, (yield from wire.get(path("runs", run_id, "/attempts"))))


def retry(run_id: UUID | str, *, key: str | None = None, **changes: Unpack[RetryChanges]) -> Flow[Run]:
    """A new run that repeats an ended one, with its input or what `changes` has. `key` as in `submit`."""
    refuse_unknown("retry", changes, ("key", *RetryChanges.__annotations__))
    return read(Run, (yield wire.once(path("runs", run_id, "/retry"), wire.body_of(Changes, changes), key)))


def cancel(run_id: UUID | str) -> Flow[Run]:
    """Cancel a run: a queued one never starts, a running one is asked to stop."""
    return read(Run, (yield from wire.post(path("runs", run_id, "/cancel"))))
