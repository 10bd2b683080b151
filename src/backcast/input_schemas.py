"""Checks inputs against the JSON Schema of a task: a compiled validator accepts, in microseconds; what it does not
accept is given to the one whose sentences explain a refusal, and whose word counts.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import jsonschema_rs

from backcast.models import JSON

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

_DEEP = 256
"""Levels of a value, more than the API reads. The compiled validator has no limit but the stack, and a process that
exceeds that is gone."""


class InputSchema:
    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        try:
            self._compiled = jsonschema_rs.Draft202012Validator(schema, retriever=_refuse)
        except (ValueError, jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError):
            self._compiled = None

    def accepts(self, value: JSON) -> bool:
        """Raises `RecursionError` (it is nested too deeply) or `OverflowError` (an integer is beyond all floats)."""
        return self._is_plainly_valid(value) or self._explaining.is_valid(value)

    def errors(self, value: JSON) -> "list[ValidationError]":
        """What is wrong with it. Raises as `accepts` does."""
        return [] if self._is_plainly_valid(value) else list(self._explaining.iter_errors(value))

    def _is_plainly_valid(self, value: JSON) -> bool:
        try:
            return self._compiled is not None and _is_shallow(value) and self._compiled.is_valid(value)
        except ValueError:  # it can't read the value, such as text that is no Unicode
            return False

    @cached_property
    def _explaining(self) -> "Draft202012Validator":
        from jsonschema import Draft202012Validator

        return Draft202012Validator(self._schema)


def _refuse(uri: str) -> Any:
    raise ValueError(f"{uri} is not fetched")


def _is_shallow(value: JSON) -> bool:
    level = [value]
    for _ in range(_DEEP):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return True
    return False
