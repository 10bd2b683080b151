"""What a supervisor and its executors send each other, as messages of `process.channel`. Values only."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import UUID

from pydantic import BaseModel, SecretStr, TypeAdapter

from backcast.models import JSON, AttemptResult, Failed, Problem, Retry, Succeeded, TaskType, Tried
from backcast.process.channel import Message
from backcast.settings import Model, Prefect, Tracing

# From the supervisor.
ASSIGN, EXECUTE, KEY, STOP, PING, TAG, ANSWER, CLOSE, TRACE = range(9)
"""`ASSIGN` is the first message. `EXECUTE` and `KEY` name the task in `meta` and have the input as their body. A
`TRACE`, with the `traceparent` in `meta`, comes before the `EXECUTE` of a traced run."""
# From the executor.
READY, REFUSED, RESULT, FREE, PONG, GET, PUT, REPORTS = range(16, 24)
"""`FREE`: the code of an attempt that is over has ended at last. `GET` and `PUT` ask for objects of the store; an
`ANSWER` has the request's id. A `PONG` has the figures of the history sink, what it has dropped, and why the process
has to be replaced, or "". `REPORTS`: what the code of a run reports while it runs."""
FOUND, MISSING, UNAVAILABLE = range(3)
"""The number of an `ANSWER`."""
_SUCCEEDED, _FAILED, _RETRY, _STOPPED, DISTURBED = range(5)
"""The number of a `RESULT`. `DISTURBED`: it has ended before its end, and nobody had asked for it."""


def largest(max_result: int) -> int:
    """Bytes of the largest message of an executor: a result, or the record of a cached one, in which Prefect has it as
    a string, with its quotation marks escaped."""
    return 2 * max_result + (32 << 20)


class Assignment(BaseModel):
    """What an executor needs to know: neither the database, nor the store, nor the keys of the API."""

    tasks: list[str]
    """Modules to import."""
    pool: str
    max_attempts: int
    slots: int
    """Runs that it may be given at once."""
    max_result: int
    log_level: str
    log_format: Literal["text", "json"]
    worker: str
    """The id of the worker, for log lines."""
    prefect: Prefect
    model: Model
    tracing: Tracing

    def message(self) -> Message:
        return Message(ASSIGN, body=json.dumps(self.model_dump(), default=_revealed).encode())


def _revealed(value: object) -> object:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case timedelta():
            return value.total_seconds()
        case Path():
            return str(value)
        case _:
            raise TypeError(type(value).__name__)


class Served(BaseModel):
    """A task that an executor serves."""

    type: TaskType
    is_cached: bool
    """Whether a run may take the value of another run: then it has a cache key."""
    is_isolated: bool = False
    """Whether each run gets a process of its own."""
    may_block: float | None = None
    """Seconds for which a run may keep the loop from answering."""


_SERVED = TypeAdapter(list[Served])


def ready(served: list[Served]) -> Message:
    return Message(READY, body=_SERVED.dump_json(served))


def served(message: Message) -> list[Served]:
    return _SERVED.validate_json(message.body)


class Asked(NamedTuple):
    """What an attempt asked of models, for metrics."""

    seconds: tuple[float, ...] = ()
    """The time of each answer: of the latest ones."""
    dollars: float = 0.0
    """The price of those answers whose price is known."""
    failures: tuple[tuple[str, str], ...] = ()
    """The casts that failed: the name of the model, and the code of the error; the latest ones."""


class Attempt(NamedTuple):
    """The end of an attempt, as its executor reports it."""

    result: AttemptResult | None
    """None: it was stopped, as it was asked to."""
    retries: int = 0
    """Retries so far, those before this attempt included."""
    usage: dict[str, JSON] | None = None
    """The tokens that were paid for."""
    is_left: bool = False
    """Its thread goes on: the slot is not free before a `FREE`."""
    tried: tuple[Tried, ...] = ()
    """The failures that were followed by a retry at once: the latest of them."""
    asked: Asked | None = None


def result(run: UUID, attempt: Attempt) -> Message:
    meta: dict[str, Any] = {}
    kind, body = _STOPPED, b""
    match attempt.result:
        case Succeeded(body):
            kind = _SUCCEEDED
        case Failed(problem, traceback):
            kind, meta = _FAILED, {"problem": problem.model_dump(), "traceback": traceback}
        case Retry(problem, delay, traceback=traceback):
            kind, meta = _RETRY, {"problem": problem.model_dump(), "traceback": traceback, "delay": delay}
        case None:
            pass
    if attempt.retries:
        meta["retries"] = attempt.retries
    if attempt.usage is not None:
        meta["usage"] = attempt.usage
    if attempt.is_left:
        meta["left"] = True
    if attempt.asked is not None:
        meta["asked"] = attempt.asked
    if attempt.tried:
        meta["tried"] = [(each.problem.model_dump(), each.traceback, each.since, each.until) for each in attempt.tried]
    return Message(RESULT, run.bytes, kind, json.dumps(meta).encode() if meta else b"", body)


def attempt(message: Message) -> Attempt:
    if message.number == _SUCCEEDED and not message.meta:  # as nearly all of them
        return Attempt(Succeeded(message.body))
    meta = json.loads(message.meta) if message.meta else {}
    retries = meta.get("retries", 0)
    ended: AttemptResult | None = None
    if message.number == _SUCCEEDED:
        ended = Succeeded(message.body)
    elif message.number == _FAILED:
        ended = Failed(Problem(**meta["problem"]), meta["traceback"])
    elif message.number == _RETRY:
        ended = Retry(Problem(**meta["problem"]), meta["delay"], retries, traceback=meta["traceback"])
    tried = tuple(Tried(Problem(**problem), *rest) for problem, *rest in meta.get("tried", ()))
    asked = Asked(*meta["asked"]) if "asked" in meta else None
    return Attempt(ended, retries, meta.get("usage"), meta.get("left", False), tried, asked)


class Progress(NamedTuple):
    fraction: float | None
    message: str
    at: float
    """Seconds since 1970."""
    retries: int
    """Of the run so far."""
    after: int
    """How many of the events beside it were emitted before it."""


class Event(NamedTuple):
    kind: str
    data: str
    """JSON."""
    at: float
    retries: int


class Line(NamedTuple):
    """A line of a run's log."""

    text: str
    """A JSON object."""
    retries: int


class Reports(NamedTuple):
    """What the code of a run has reported since the message before."""

    progress: Progress | None
    """The newest."""
    events: list[Event]
    lines: list[Line]


def reports(run: bytes, given: Reports) -> Message:
    return Message(REPORTS, run, body=json.dumps(given, ensure_ascii=False).encode())


def reported(message: Message) -> Reports:
    progress, events, lines = json.loads(message.body)
    newest = None if progress is None else Progress(*progress)
    return Reports(newest, [Event(*event) for event in events], [Line(*line) for line in lines])
