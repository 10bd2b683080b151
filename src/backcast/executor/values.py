"""Writes a task's values as plain JSON."""

import json
from typing import Any

from pydantic_core import PydanticSerializationError, to_jsonable_python

from backcast.errors import FatalError


def to_json(value: Any, *, verb: str = "returned") -> bytes:
    """The plain JSON of what a task has returned or emitted: models, dataclasses, dates and such by pydantic's rules.

    Raises:
        FatalError: `unserialisable_result`; the message names the type or value.
    """
    try:
        text = json.dumps(to_jsonable_python(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        return text.encode()
    except (PydanticSerializationError, ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        raise FatalError(
            f"The task {verb} a {type(value).__name__} that can't be written as JSON ({error}): return plain values,"
            " pydantic models or dataclasses.",
            code="unserialisable_result",
        ) from None
