"""Reads the columns that SQL, or an older release, may have filled with anything: one row that can't be shown must not
hide the others.
"""

import contextlib
import json
import math
from datetime import datetime
from typing import Any

import asyncpg

from backcast.models import JSON, Problem, Progress
from backcast.texts import storable

# The times that a Python datetime can hold, with the zone that asyncpg omits at infinity.
_FIRST, _LAST = "'0001-01-01 00:00:00+00'::timestamptz", "'9999-12-31 23:59:59+00'::timestamptz"


def time(column: str) -> str:
    """SQL for a column of times, within what can be shown."""
    within = f"when {column} < {_FIRST} then {_FIRST} when {column} > {_LAST} then {_LAST}"
    return f"case {within} else {column} end as {column}"


def age(time: str) -> str:
    """SQL: the seconds since then, of a time that SQL may have set to anything, or null."""
    seconds = f"extract(epoch from now() - greatest(least({time}, now()), '1900-01-01'))::float8"
    return f"case when {time} is not null then {seconds} end"


def readable(column: str) -> str:
    """SQL: whether a statement can read inside of this JSON, see `is_readable`. Little JSON has such escapes at all."""
    return f"({column}::text !~ '\\\\u(0000|[dD][89a-fA-F])' or is_readable({column}))"


def started(row: asyncpg.Record) -> datetime | None:
    """When the latest attempt began. A run that a worker only had, and released or put on a route, has not started."""
    return row["started_at"] if row["attempts_used"] or row["state"] == "running" else None


def loaded(text: str) -> JSON:
    """JSON that UTF-8 and JSON can carry on: without lone surrogates, NaN and infinity. What can't be read is None."""
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:
            value = json.loads(storable(json.dumps(value, ensure_ascii=False)))
    except (ValueError, RecursionError):
        return None
    return value


def _number(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


def _nothing(_: str) -> None:
    return None


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_nothing)


def mapping(text: str | None) -> dict[str, Any]:
    """The plain values of an object; it has no others."""
    value = loaded(text) if text else None
    if not isinstance(value, dict):
        return {}
    return {name: each for name, each in value.items() if not isinstance(each, dict | list)}


def problem(text: str) -> Problem:
    given = mapping(text)
    code, title, detail = (given.get(name) for name in ("code", "title", "detail"))
    if isinstance(code, str) and isinstance(title, str) and isinstance(detail, str):
        return Problem(code=code, title=title, detail=detail)
    return Problem(code="unreadable_error", title="The recorded error can't be read", detail=text[:300])


def progress(text: str) -> Progress | None:
    given = mapping(text)
    with contextlib.suppress(ValueError):  # pydantic's is one
        return Progress.model_validate({name: given.get(name) for name in Progress.model_fields})
    return None
