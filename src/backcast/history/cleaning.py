"""Cleans what Prefect's server is sent. Its database takes no NUL, UTF-8 no lone surrogate, an index no long name; and
the server loses a whole batch for one of them, some without a word.
"""

import json
import math
from typing import Any

from backcast.texts import storable

NAME = 200
"""Characters of a name."""
TEXT = 10_000
"""Characters of any other text of an event: the server refuses events beyond 1.5 MB."""
LINE = 250_000
"""Characters of a log line."""
_NAMES = ("name", "task_key", "dynamic_key", "task_version", "prefect.resource.name", "prefect.state-name")
_LARGEST = 2**31 - 1
_SUSPECT = (b"\\ud", b"\\u0000", b"NaN", b"Infinity")


def text(value: str, longest: int = TEXT) -> str:
    if len(value) > longest:
        value = value[: longest - 1] + "…"
    return storable(value)


def plain(body: bytes) -> bytes:
    """The same JSON, clean; its texts are short enough already."""
    return dumps(clean(json.loads(body), len(body))) if any(mark in body for mark in _SUSPECT) else body


def clean(value: Any, longest: int = TEXT, key: str = "") -> Any:
    """A JSON value without what the server can't store. `longest` is the most characters of texts that are no names."""
    match value:
        case str():
            return text(value, NAME if key in _NAMES else longest)
        case dict():
            return {text(str(name), NAME): clean(each, longest, name) for name, each in value.items()}
        case list() | tuple():
            return [clean(each, longest) for each in value]
        case float() if not math.isfinite(value):
            return None
        case int() if abs(value) > 2**63 - 1:
            return float(min(max(value, -_LARGEST), _LARGEST))
        case _:
            return value


def line(given: dict[str, Any]) -> bytes:
    """A log line of Prefect's handler."""
    level = given.get("level")
    if isinstance(level, int):
        given["level"] = min(max(level, -_LARGEST), _LARGEST)
    return dumps(clean(given, LINE))


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=str).encode()
