"""Checks inputs against the schema that a task's signature has, without taking long: patterns in linear time, the first
errors only, nothing fetched, nothing checked twice. The task's own process makes the last check, so neither a schema
that can't be applied nor a check that takes too long refuses anything.
"""

import logging
import reprlib
import time
from collections.abc import Callable
from contextvars import ContextVar
from itertools import islice
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry

from backcast.models import JSON
from backcast.targets.validation import LINEAR_RULES

log = logging.getLogger("backcast.targets")

MOST = 20
"""Errors that are looked for."""
_LONGEST = 1.0
"""Seconds of the processor that one check may take, in which its process does nothing else."""
_MANY = 1000
"""Items or fields of one value for which jsonschema may compare each with each."""


class Inputs:
    def __init__(self, schema: dict[str, JSON]) -> None:
        self._validator = _Validator(schema, registry=Registry())
        self._is_reported = False

    def misfits(self, given: JSON) -> list[ValidationError]:
        """The first `MOST` of them, as far as the time allows. Raises `RecursionError` or `OverflowError`: the input
        can't be checked."""
        found = list[ValidationError]()
        _check.set(_Check())
        try:
            for error in islice(self._validator.iter_errors(given), MOST):
                found.append(error)
        except (RecursionError, OverflowError):
            raise
        except _TooLong:
            pass
        except Exception:
            if not self._is_reported:
                log.exception("the schema of a task can't be applied, so only its worker checks the inputs")
            self._is_reported = True
            return []
        return found

    def fits(self, given: JSON) -> bool:
        """Whether it does, or can't be checked here."""
        try:
            return not self.misfits(given)
        except (RecursionError, OverflowError):
            return True


class _TooLong(Exception):
    pass


class _Check:
    """The check of one input."""

    def __init__(self) -> None:
        self.until = time.thread_time() + _LONGEST
        self.followed = dict[tuple[int, int], tuple[str, list[str | int]] | None]()
        """By the places of a reference and of a value, which both outlive the check: the first error, if there is one.
        A schema that leads back to itself in two ways would otherwise be applied 2**n times at a depth of n."""
        self.is_dynamic = False
        """A reference has led to a place that depends on the way to it."""


_check: ContextVar[_Check] = ContextVar("backcast_inputs_check")


def _reference(validator: Any, reference: str, value: JSON, beside: Any) -> Any:
    check, place = _check.get(), (id(beside), id(value))
    if place in check.followed and not check.is_dynamic:
        if (first := check.followed[place]) is not None:
            yield ValidationError(first[0], path=first[1])
        return
    for error in validator._validate_reference(ref=reference, instance=value):
        check.followed.setdefault(place, (error.message, list(error.path)))
        yield error
    check.followed.setdefault(place, None)


def _dynamic_reference(validator: Any, reference: str, value: JSON, _: Any) -> Any:
    _check.get().is_dynamic = True
    yield from validator._validate_reference(ref=reference, instance=value)


# The stock rules keep the errors of all branches, each with the value in words: gigabytes for a deep value.
def _any_of(validator: Any, schemas: list[JSON], value: JSON, _: Any) -> Any:
    for schema in schemas:
        if next(validator.descend(value, schema), None) is None:
            return
    yield ValidationError(f"{reprlib.repr(value)} is not valid under any of the given schemas")


def _one_of(validator: Any, schemas: list[JSON], value: JSON, _: Any) -> Any:
    fitting = 0
    for schema in schemas:
        fitting += next(validator.descend(value, schema), None) is None
    if fitting != 1:
        yield ValidationError(f"{reprlib.repr(value)} is valid under {fitting} of the given schemas, not under one")


def _bounded(keyword: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    compares = keyword.startswith("unevaluated")

    def bounded(validator: Any, wanted: JSON, value: JSON, beside: Any) -> Any:
        is_many = compares and isinstance(value, list | dict) and len(value) > _MANY
        if is_many or time.thread_time() > _check.get().until:
            raise _TooLong
        return rule(validator, wanted, value, beside)

    return bounded


_RULES = {
    **Draft202012Validator.VALIDATORS,
    **LINEAR_RULES,
    "$ref": _reference,
    "$dynamicRef": _dynamic_reference,
    "anyOf": _any_of,
    "oneOf": _one_of,
}
_Validator: Any = extend(Draft202012Validator, {name: _bounded(name, rule) for name, rule in _RULES.items()})
