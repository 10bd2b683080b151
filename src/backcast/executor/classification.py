"""Classifies the failures of tasks: the problem that callers see, whether a retry may follow, and after which delay.
The rules are the same for both ways of executing a task. Knows neither Prefect nor runs.
"""

from typing import Any, TypeVar, cast

from backcast.errors import RunError
from backcast.models import Problem
from backcast.texts import storable

E = TypeVar("E", bound=BaseException)

_DETAIL = 2000
"""Characters of an exception's message that are kept."""


def problem(cause: BaseException | None, message: str | None = None) -> Problem:
    """The problem of a failed attempt: from its exception, which is `readable`, or from the message of the failed state
    that it returned."""
    if isinstance(cause, RunError):
        return Problem(code=cause.code, title=cause.title, detail=storable(cause.detail[:_DETAIL]))
    detail = message or "" if cause is None else f"{type(cause).__name__}: {cause}"
    return Problem(code=RunError.code, title=RunError.title, detail=storable(detail[:_DETAIL]))


def readable(error: E) -> E:
    """The same exception, with a message and a `repr` of ours if its own raise: whoever shows it must not fail."""
    try:
        _ = str(error), repr(error)
    except Exception as failure:  # noqa: BLE001  # whatever the user's code raises
        words = f"(its message can't be read: {type(failure).__name__})"
        kind = type(error)

        def repeat(_: BaseException) -> str:
            return words

        members = {"__str__": repeat, "__repr__": repeat, "__module__": kind.__module__, "__slots__": ()}
        cast("Any", error).__class__ = type(kind.__name__, (kind,), members)
    return error


def may_retry(cause: object) -> bool:
    """Whether our error kinds allow another attempt; the task's own rules apply as well."""
    return not isinstance(cause, RunError) or cause.retryable


def retry_after(cause: object) -> float | None:
    """Seconds that the refusing service has asked us to wait."""
    after = cause.retry_after if isinstance(cause, RunError) else None
    return None if after is None else after.total_seconds()
