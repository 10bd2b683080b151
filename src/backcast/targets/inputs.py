"""Checks inputs against the schema that a task's signature has, without taking long: patterns in linear time, the first
errors only, nothing fetched. The task's own process makes the last check, so a schema that can't be applied refuses
nothing.
"""

import logging
from itertools import islice
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry

from backcast.models import JSON
from backcast.targets.validation import PATTERN_RULES

log = logging.getLogger("backcast.targets")

MOST = 20
"""Errors that are looked for."""
_Validator: Any = extend(Draft202012Validator, PATTERN_RULES)


class Inputs:
    def __init__(self, schema: dict[str, JSON]) -> None:
        self._validator = _Validator(schema, registry=Registry())
        self._is_reported = False

    def misfits(self, given: JSON) -> list[ValidationError]:
        """The first `MOST` of them. Raises `RecursionError` or `OverflowError`: the input can't be checked."""
        try:
            return list(islice(self._validator.iter_errors(given), MOST))
        except (RecursionError, OverflowError):
            raise
        except Exception:
            if not self._is_reported:
                log.exception("the schema of a task can't be applied, so only its worker checks the inputs")
            self._is_reported = True
            return []

    def fits(self, given: JSON) -> bool:
        """Whether it does, or can't be checked here."""
        try:
            return not self.misfits(given)
        except (RecursionError, OverflowError):
            return True
