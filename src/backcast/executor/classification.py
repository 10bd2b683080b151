"""Classifies the failures of tasks: the problem and the traceback that callers see, whether a retry may follow, and
after which delay.

The rules are the same for both ways of executing a task. Knows nothing of runs, and of Prefect only where it is.
"""

import traceback
from pathlib import Path
from typing import Any, TypeVar, cast

import prefect

from backcast.errors import RunError
from backcast.executor.redaction import redacted
from backcast.models import Failed, Problem
from backcast.texts import storable

E = TypeVar("E", bound=BaseException)

_DETAIL = 2000
"""Characters of an exception's message that are kept."""


TRACEBACK = 8 * 1024
"""Bytes of a traceback that are kept: its end."""
_FRAMES = 100
"""The innermost frames of each exception that are read."""
_PART = 64 * 1024
"""Characters of a part of a traceback that are read: for a thousand times more, the loop would stand still."""
_LINE = 1000
"""Characters of a line of a traceback: a long message must not take the room of the frames."""
_OURS = (str(Path(__file__).parent), str(Path(prefect.__file__).parent))


def failed(cause: BaseException | None, message: str | None = None) -> Failed:
    """As for `problem`."""
    return Failed(problem(cause, message), "" if cause is None else _traceback(cause))


def problem(cause: BaseException | None, message: str | None = None) -> Problem:
    """The problem of a failed attempt: from its exception, which is `readable`, or from the message of the failed state
    that it returned."""
    if isinstance(cause, RunError):
        return Problem(code=_detail(cause.code), title=_detail(cause.title), detail=_detail(cause.detail))
    detail = message or "" if cause is None else f"{type(cause).__name__}: {cause}"
    return Problem(code=RunError.code, title=RunError.title, detail=_detail(detail))


def _detail(text: object) -> str:
    return storable(redacted(str(text)[: 2 * _DETAIL])[:_DETAIL])


def _traceback(error: BaseException) -> str:
    """From the first frame of the task's code, or of what of it is near enough to the end."""
    try:
        found = traceback.TracebackException.from_exception(error, limit=-_FRAMES, compact=True)
        part: traceback.TracebackException | None = found
        while part is not None:
            while len(part.stack) > 1 and part.stack[0].filename.startswith(_OURS):
                del part.stack[0]
            part = part.__cause__ or part.__context__
        lines = redacted("".join(map(_start, found.format()))).splitlines()
        text = storable("\n".join(line if len(line) <= _LINE else f"{line[:_LINE]}…" for line in lines)).encode()
    except Exception:  # noqa: BLE001  # an exception may have any attributes
        return ""
    if len(text) <= TRACEBACK:
        return text.decode()
    end = text[-TRACEBACK:].decode(errors="ignore")
    return end[end.find("\n") + 1 :]


def _start(part: str) -> str:
    """Up to a line's end, or a secret might be cut."""
    return part if len(part) <= _PART else part[:_PART].rsplit("\n", 1)[0] + "…\n"


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
