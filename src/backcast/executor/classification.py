"""What the end of a task's function means, whoever called it: its value as JSON, its failure as a problem, and whether
it may be tried again. Knows neither Prefect nor runs.
"""

import json
from typing import Any

from pydantic_core import PydanticSerializationError, to_jsonable_python

from backcast.errors import FatalError, RunError
from backcast.models import Problem

_DETAIL = 2000
"""Characters of an exception's message that are kept."""


def to_json(value: Any) -> bytes:
    """The plain JSON of a task's return value: models, dataclasses, dates and the like by pydantic's rules.

    Raises:
        FatalError: `unserialisable_result`; the sentence names the type or value.
    """
    try:
        text = json.dumps(to_jsonable_python(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        return text.encode()
    except (PydanticSerializationError, ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        raise FatalError(
            f"The task returned a {type(value).__name__} that can't be written as JSON ({error}): return plain values,"
            " pydantic models or dataclasses.",
            code="unserialisable_result",
        ) from None


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
