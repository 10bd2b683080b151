"""What the nouns are made of: JSON values, names, times, numbers, ids; and the problem, which all of them may have."""

import json
import re
import secrets
import time
from datetime import UTC, datetime
from typing import Annotated, Any, Self
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import from_json

from backcast import names
from backcast.errors import BackcastError

JSON = Any
"""A plain JSON value: None, bool, int, float, str, list, dict with string keys."""


def parse_json(text: str) -> JSON:
    """Strict JSON: no NaN, no lone surrogates, bounded nesting and number length. Raises `ValueError`."""
    return from_json(text.encode(), allow_inf_nan=False)


def uuid7(ago: float = 0.0) -> UUID:
    """A new run id: time-ordered (RFC 9562, with sub-millisecond bits), made here because PostgreSQL 15 to 17 can't.

    With `ago`, it is an id of so many seconds ago: a bound for ranges of ids. None is from before 1970.
    """
    now = max(0, time.time_ns() - int(ago * 1_000_000_000))
    ms, rest = divmod(now, 1_000_000)
    return UUID(int=ms << 80 | 7 << 76 | rest * 4096 // 1_000_000 << 64 | 2 << 62 | secrets.randbits(62))


Name = Annotated[str, AfterValidator(names.check), WithJsonSchema({"type": "string", **names.SCHEMA})]
"""The name of a task, a lane or an owner."""


IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,200}")
KEY_RULE = "An Idempotency-Key has 1 to 200 printable ASCII characters."


Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""A text that PostgreSQL stores."""


def _text_only(value: object) -> object:
    if isinstance(value, datetime) or (isinstance(value, str) and _RFC_3339.fullmatch(value)):
        return value
    why = "with date, time and offset" if isinstance(value, str) else "as a number may mean too many things"
    raise ValueError(f"a time is written as 2030-01-31T08:00:00Z, {why}")


def _in_range(value: datetime) -> datetime:
    """In UTC. The driver sends the first and the last microsecond as infinity, of which PostgreSQL has no age."""
    try:
        return min(max(value.astimezone(UTC), _FIRST), _LAST)
    except OverflowError:
        raise ValueError("the time is outside of the years 1 to 9999 in UTC") from None


_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d([.,]\d+)?)?([Zz]|[+-]\d\d:?\d\d)")
_FIRST = datetime.min.replace(tzinfo=UTC, microsecond=1)
_LAST = datetime.max.replace(tzinfo=UTC, microsecond=999_998)
Moment = Annotated[AwareDatetime, BeforeValidator(_text_only), AfterValidator(_in_range)]


def _number(value: object) -> object:
    if isinstance(value, bool | str):
        raise ValueError("a number is wanted")  # pydantic would take true for 1
    return value


Number = BeforeValidator(_number)
"""After the bounds of its type, which then are part of the JSON Schema."""


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


Figure = Annotated[float, AfterValidator(_rounded)]
"""An age, a duration or a pace, in three digits."""


METADATA = 16 * 1024
"""Bytes of JSON that the metadata of a run may have in all: it is part of every answer about the run."""


def _bounded(metadata: dict[str, str]) -> dict[str, str]:
    if len(json.dumps(metadata, ensure_ascii=False).encode(errors="replace")) > METADATA:
        raise ValueError(f"the metadata may have {METADATA} bytes of JSON in all")
    return metadata


class Noun(BaseModel):
    """A value with nothing but the fields that it names."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Problem(Noun):
    """The reason why a run, or an attempt of it, did not succeed."""

    code: str
    """Stable; clients may branch on it."""
    title: str
    detail: str

    @classmethod
    def from_error(cls, error: BackcastError) -> Self:
        return cls(code=error.code, title=error.title, detail=error.detail)


Input = dict[str, JSON]
Priority = Annotated[int, Field(ge=-100, le=100), Number]
Metadata = Annotated[dict[str, str], Field(max_length=32), AfterValidator(_bounded)]
