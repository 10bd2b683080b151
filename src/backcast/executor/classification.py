"""What the end of a task's function means, whoever called it: its value as JSON, its failure as a problem, and whether
it may be tried again. Knows neither Prefect nor runs.
"""

from backcast.errors import RunError
from backcast.models import Problem

_DETAIL = 2000
"""Characters of an exception's message that are kept."""


def problem(cause: BaseException | None, message: str | None = None) -> Problem:
    """Why an attempt failed: by its exception, or by what a task that returned a failed state says there."""
    if isinstance(cause, RunError):
        return Problem(code=cause.code, title=cause.title, detail=clean(cause.detail)[:_DETAIL])
    detail = message or "" if cause is None else f"{type(cause).__name__}: {cause}"
    return Problem(code=RunError.code, title=RunError.title, detail=clean(detail)[:_DETAIL])


def may_retry(cause: object) -> bool:
    """Whether our error kinds allow another attempt; the task's own rules come on top."""
    return not isinstance(cause, RunError) or cause.retryable


def retry_after(cause: object) -> float | None:
    """Seconds that whoever refused has asked us to wait."""
    after = cause.retry_after if isinstance(cause, RunError) else None
    return None if after is None else after.total_seconds()


def clean(text: str) -> str:
    """What can't be UTF-8 (lone surrogates) or text in PostgreSQL (NUL) is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
