"""Every error of backcast, grouped by the party that must act on it.

    BackcastError
    ├── ClientError                     the caller must change the request; becomes a 4xx problem document
    │   ├── MalformedRequest    400     ├── BodyTooLarge        413
    │   ├── MalformedBody       400     ├── UnsupportedBody     415
    │   ├── Unauthorized        401     ├── InvalidInput        422
    │   ├── ReadOnlyKey         403     │   └── InvalidTarget   422
    │   ├── ForeignHost         403     ├── IdempotencyConflict 422
    │   ├── ForeignOrigin       403     │
    │   ├── NotFound            404     ├── TooManyWaiting      429
    │   │   ├── UnknownTask             └── HeadTooLarge        431
    │   │   ├── UnknownRun
    │   │   ├── UnknownBatch
    │   │   ├── UnknownOperation
    │   │   ├── UnknownLane
    │   │   ├── UnknownPool
    │   │   └── UnknownWorker
    │   ├── MethodNotAllowed    405
    │   ├── RequestTooSlow      408
    │   ├── NotFinished         409
    │   ├── NoResult            409
    │   ├── ResultGone          410
    │   └── InputGone           410
    ├── Unavailable             503     a needed service is away; the same request may succeed later
    │   ├── LedgerUnavailable
    │   │   └── LedgerFull
    │   ├── StoreUnavailable
    │   ├── NoSpace
    │   ├── NoWorkerYet
    │   └── TooManyStreams
    ├── LedgerFault             500     the database refuses a statement of ours: no wait will help
    ├── WaitTimeout                     a client has waited for its whole timeout; the run goes on
    ├── ConfigurationError              an operator must change a setting; the sentence names it
    └── RunError                        the reason why an attempt failed; its class decides about a retry
        ├── UsageError                  the input can't be worked on: never retried
        ├── FatalError                  no retry will help (a wrong key, an unserialisable result): never retried
        ├── TransientError              may pass: retried as the task sets; a provider's Retry-After beats the backoff
        └── RunTimeout                  took longer than the task allows: retried as the task sets

Every class carries a stable `code` that clients may branch on; the message names the next step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from typing import ClassVar, Self


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that is nearest to an unknown one, after a space; empty when none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def refuse_unknown(call: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError, as Python does for a call, when an option is given that `call` does not take."""
    known = tuple(known)
    for name in given:
        if name not in known:
            raise TypeError(
                f"{call}() takes no option {name!r}.{did_you_mean(name, known)} It takes {', '.join(known)}."
            )


@dataclass(frozen=True, slots=True)
class FieldError:
    """One wrong place in a request: a JSON pointer into the body (`""` is the whole body) and a sentence."""

    pointer: str
    detail: str


class BackcastError(Exception):
    """Root of the tree. As a problem it is a bug of ours: the log of the API has the details."""

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Something went wrong on our side"
    status: ClassVar[int] = 500

    @property
    def detail(self) -> str:
        return str(self)


class ClientError(BackcastError):
    """The caller must change the request."""

    code = "bad_request"
    title = "The request can't be used"
    status = 400

    def __init__(self, detail: str, *, errors: tuple[FieldError, ...] = ()) -> None:
        super().__init__(detail)
        self.errors = errors


class MalformedRequest(ClientError):
    """The bytes that arrived are no HTTP request; the connection is closed."""

    code = "malformed_request"
    title = "The request is not HTTP"


class MalformedBody(ClientError):
    code = "malformed_body"
    title = "The body can't be read"


class Unauthorized(ClientError):
    code = "unauthorized"
    title = "A key is needed"
    status = 401


class ReadOnlyKey(ClientError):
    code = "read_only_key"
    title = "The key lets nothing be changed"
    status = 403


class ForeignHost(ClientError):
    """The request's `Host` is not a name of this service; without this check a web page could reach it by a name of the
    page's own."""

    code = "foreign_host"
    title = "The request is for another host"
    status = 403


class ForeignOrigin(ClientError):
    """The request is from a web page of another origin, which has no right to use a service without keys."""

    code = "foreign_origin"
    title = "The request is from a foreign web page"
    status = 403


class NotFound(ClientError):
    code = "not_found"
    title = "There is nothing here"
    status = 404


class UnknownTask(NotFound):
    code = "unknown_task"
    title = "No worker has registered this task"


class UnknownRun(NotFound):
    code = "unknown_run"
    title = "There is no such run"

    @classmethod
    def of(cls, run: object) -> Self:
        return cls(f"There is no run {run}: it was never accepted here, or it has been removed.")


class UnknownBatch(NotFound):
    code = "unknown_batch"
    title = "There is no such batch"


class UnknownOperation(NotFound):
    code = "unknown_operation"
    title = "There is no such operation"


class UnknownLane(NotFound):
    code = "unknown_lane"
    title = "This lane has no limits"


class UnknownPool(NotFound):
    code = "unknown_pool"
    title = "There is no such pool"


class UnknownWorker(NotFound):
    code = "unknown_worker"
    title = "There is no such worker"

    @classmethod
    def of(cls, worker: object) -> Self:
        return cls(f"There is no worker {worker}: it has stopped, or its runs were given to others.")


class MethodNotAllowed(ClientError):
    """The path is right and the method is not; the header `Allow` has those that it takes."""

    code = "method_not_allowed"
    title = "This path does not take this method"
    status = 405


class NotFinished(ClientError):
    """The run has no result yet; ask again after `retry_after`."""

    code = "not_finished"
    title = "The run has not finished"
    status = 409
    retry_after = timedelta(seconds=1)


class NoResult(ClientError):
    """The run has ended without a result: it failed, was cancelled or expired."""

    code = "no_result"
    title = "The run has no result"
    status = 409


class ResultGone(ClientError):
    code = "result_gone"
    title = "The result is no longer stored"
    status = 410


class InputGone(ClientError):
    code = "input_gone"
    title = "The input is no longer stored"
    status = 410


class RequestTooSlow(ClientError):
    """The head or the body of a request took too long to arrive; the connection is closed."""

    code = "request_too_slow"
    title = "The request arrives too slowly"
    status = 408


class HeadTooLarge(ClientError):
    code = "head_too_large"
    title = "Request line and headers are too large"
    status = 431


class BodyTooLarge(ClientError):
    code = "body_too_large"
    title = "The body is too large"
    status = 413


class UnsupportedBody(ClientError):
    code = "unsupported_body"
    title = "The body has a media type that is not understood here"
    status = 415


class InvalidInput(ClientError):
    """The input is readable, but the task or the route does not take it; `errors` names each wrong field."""

    code = "invalid_input"
    title = "The input is not what is expected"
    status = 422


class InvalidTarget(InvalidInput):
    code = "invalid_target"
    title = "The target is not a shape that can be cast to"


class IdempotencyConflict(ClientError):
    code = "idempotency_key_reused"
    title = "This Idempotency-Key was used with another request"
    status = 422


class TooManyWaiting(ClientError):
    """No further runs may wait; submit again after `retry_after`, when there should be room."""

    code = "too_many_waiting"
    title = "Too many runs are waiting"
    status = 429

    def __init__(self, detail: str, *, retry_after: timedelta) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class Unavailable(BackcastError):
    """A needed service is away. Nothing is lost; the same request may succeed after `retry_after`."""

    code = "unavailable"
    title = "The service is not available right now"
    status = 503
    retry_after = timedelta(seconds=2)

    def __init__(self, detail: str, *, reason: str = "") -> None:
        super().__init__(f"{detail} ({reason})" if reason else detail)
        self._detail = detail
        self.reason = reason
        """The service's own words: for operators, as they may name its files and addresses."""

    @property
    def detail(self) -> str:
        return self._detail


class LedgerUnavailable(Unavailable):
    code = "ledger_unavailable"
    title = "The database can't be reached"


class LedgerFull(LedgerUnavailable):
    """The database can't store anything more until its disk has room again. Reading still works."""

    code = "ledger_full"
    title = "The database's disk is full"


class LedgerFault(BackcastError):
    """The database refuses a statement of this release: a right or a column is missing, or it is damaged. An operator
    must act; the log has the reason."""

    code = "ledger_fault"
    title = "The database refuses a statement"

    def __init__(self, reason: str) -> None:
        super().__init__(f"The database refuses a statement of this release: {reason}. See `backcast check`.")

    @property
    def detail(self) -> str:
        return "The database refuses a statement of this release: its operator finds the reason in the log."


class StoreUnavailable(Unavailable):
    code = "store_unavailable"
    title = "The result store can't be reached"


class NoSpace(Unavailable):
    """The API's disk for temporary files is full: the lines of a large batch are kept there until all have come. Send
    smaller batches, or give the API more room in its temporary folder."""

    code = "no_space"
    title = "The API's disk for temporary files is full"


class NoWorkerYet(Unavailable):
    """The first worker has not registered its tasks yet, so no task is known."""

    code = "no_worker_yet"
    title = "No worker has registered its tasks yet"


class TooManyStreams(Unavailable):
    """This API process sends as many streams of events as it may (`api.max_streams`); another one may have room. A
    request for the run itself, with `Prefer: wait`, needs no stream."""

    code = "too_many_streams"
    title = "Too many streams are open"
    retry_after = timedelta(seconds=5)


class WaitTimeout(BackcastError, TimeoutError):
    """The run had not ended when the caller's `timeout` had passed. The run itself goes on."""

    code = "wait_timeout"
    title = "The run has not ended in time"


class ConfigurationError(BackcastError):
    code = "configuration"
    title = "A setting must be changed"


class RunError(BackcastError):
    """The reason why an attempt failed. Tasks may raise the subclasses to decide about their own retry."""

    code = "task_failed"
    title = "The task failed"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, code: str | None = None, retry_after: timedelta | None = None) -> None:
        super().__init__(detail)
        if code is not None:
            self.code = code  # type: ignore[misc]  # an instance may be more precise than its class
        self.retry_after = retry_after


class UsageError(RunError):
    code = "unusable_input"
    title = "The task can't work on this input"


class FatalError(RunError):
    code = "task_failed"
    title = "The task failed for good"


class TransientError(RunError):
    code = "temporarily_failed"
    title = "The task failed for a reason that may pass"
    retryable = True


class RunTimeout(RunError):
    code = "timeout"
    title = "The task took longer than it may"
    retryable = True
