"""Checks whether a value has the wanted shape: JSON Schema 2020-12, with checked formats and linear-time patterns."""

import functools
import ipaddress
import json
import math
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import date, datetime, time
from fractions import Fraction
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend
from pydantic import AnyUrl
from pydantic_core import to_jsonable_python

from backcast.models import JSON
from backcast.targets.patterns import compiled_pattern
from backcast.targets.refusal import escaped

Schema = dict[str, JSON]
_definitions: ContextVar[Schema] = ContextVar("backcast_target_definitions")
_followed: ContextVar[list[None]] = ContextVar("backcast_target_followed")

_STEPS = 20_000
"""References that the check of one value may follow: a schema that leads back to itself in several ways could otherwise
be made to take for ever by a deep value."""


class Misfit(ValueError):
    """A value does not have the shape: the sentence, its place as a JSON pointer, and the keyword that it breaks."""

    def __init__(self, sentence: str, place: str = "", rule: str = "type") -> None:
        super().__init__(sentence)
        self.place, self.rule = place, rule


@dataclass(frozen=True)
class Target:
    """A wanted shape: a label for logs, its plain schema, and the check of a value. References in the schema lead to
    its `$defs`, from places that lead back to themselves."""

    name: str
    schema: Schema = field(repr=False)

    @property
    def needs_instructions(self) -> bool:
        """Any text would do: without instructions there is nothing to look for."""
        return self.schema == {"type": "string"}

    def validate(self, value: JSON) -> JSON:
        """The value as plain JSON (dates become ISO strings, 3.0 stays a valid integer as JSON Schema has it).

        Raises:
            Misfit: it does not have the shape; the sentence names the place.
        """
        try:
            plain = to_jsonable_python(value)
            json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()  # NaN and lone surrogates are no JSON
            _definitions.set(self.schema.get("$defs", {}))
            _followed.set([])
            error = best_match(self._validator.iter_errors(plain))
        except (RecursionError, OverflowError) as error:
            raise Misfit(f"The value can't be checked: {error}.") from None
        except Misfit:
            raise
        except ValueError as error:
            raise Misfit(f"The value is not plain JSON ({error}).") from None
        if error is not None:
            raise _misfit(error)
        return plain

    @functools.cached_property
    def _validator(self) -> Draft202012Validator:
        return _Validator(self.schema, format_checker=_Validator.FORMAT_CHECKER)


def is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def _pattern(_: Any, pattern: str, value: JSON, __: Any) -> Any:
    if isinstance(value, str) and not compiled_pattern(pattern)(value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Schema, value: JSON, _: Any) -> Any:
    for pattern, schema in patterns.items():
        for name in value if isinstance(value, dict) else ():
            if compiled_pattern(pattern)(name):
                yield from validator.descend(value[name], schema, path=name, schema_path=pattern)


def _additional_properties(validator: Any, schema: JSON, value: JSON, beside: Schema) -> Any:
    """The stock one would match the names with Python's own engine."""
    patterns = [compiled_pattern(pattern) for pattern in beside.get("patternProperties", ())]
    for name in value if isinstance(value, dict) else ():
        if name in beside.get("properties", ()) or any(matches(name) for matches in patterns):
            continue
        if schema is False:
            yield ValidationError(f"Additional properties are not allowed ({name!r} was unexpected)")
        else:
            yield from validator.descend(value[name], schema, path=name)


def _unique_items(_: Any, wanted: bool, value: JSON, __: Any) -> Any:
    """By the items' texts, in which 1.0 is 1 and true is not; the stock one may compare each item with each."""
    if wanted and isinstance(value, list):
        texts = {json.dumps(_whole(item), sort_keys=True) for item in value}
        if len(texts) < len(value):
            yield ValidationError(f"{value!r} has non-unique elements")


def _whole(value: JSON) -> JSON:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {name: _whole(item) for name, item in value.items()} if isinstance(value, dict) else value


def _reference(validator: Any, reference: str, value: JSON, _: Any) -> Any:
    steps = _followed.get()
    if len(steps) >= _STEPS:
        raise Misfit(f"The value can't be checked: it leads through more than {_STEPS} references of the schema.")
    steps.append(None)
    definition = _definitions.get()[reference.removeprefix("#/$defs/")]
    yield from validator.descend(value, definition)


def _multiple_of(_: Any, step: float, value: JSON, __: Any) -> Any:
    """Compare the numbers as written: in binary 19.99 is no multiple of 0.01."""
    if is_number(value) and Fraction(str(value)) % Fraction(str(step)):
        yield ValidationError(f"{value!r} is not a multiple of {step!r}")


def _shaped(shape: str, check: Callable[[str], Any] = bool) -> Callable[[str], Any]:
    """Checks the shape, then the calendar: the standard library alone accepts more than the shape."""
    expression = re.compile(shape, re.ASCII)
    return lambda value: expression.fullmatch(value) and check(value)


def _is_version(version: int) -> Callable[[str], bool]:
    return lambda value: value[14] == str(version)


_CLOCK = r"\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?"  # texts seldom name the zone
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_UUID = r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
FORMATS: Mapping[str, Callable[[str], Any]] = {
    "date": _shaped(r"\d{4}-\d\d-\d\d", date.fromisoformat),
    "date-time": _shaped(r"\d{4}-\d\d-\d\d[T ]" + _CLOCK, datetime.fromisoformat),
    "time": _shaped(_CLOCK, time.fromisoformat),
    "duration": _shaped(r"-?P(?=[\dT])(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+(\.\d+)?S)?)?)"),
    "email": _shaped(rf"(?=.{{3,254}}$)[\w.!#$%&'*+/=?^`{{|}}~-]{{1,64}}@{_LABEL}(\.{_LABEL})*"),  # as in HTML forms
    "uri": _shaped(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s\x00-\x1f]+", AnyUrl),
    "uuid": _shaped(_UUID),
    **{f"uuid{version}": _shaped(_UUID, _is_version(version)) for version in range(1, 9)},  # as pydantic has them
    "hostname": _shaped(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*"),
    "ipv4": _shaped(r"[\d.]+", ipaddress.IPv4Address),
    "ipv6": _shaped(r"[\dA-Fa-f:.]+", ipaddress.IPv6Address),
}
"""The formats that are checked; any other one is an annotation, as the standard has it."""


def _format_checker() -> FormatChecker:
    def only_text(holds: Callable[[str], Any]) -> Callable[[object], bool]:
        return lambda value: not isinstance(value, str) or bool(holds(value))

    checker = FormatChecker(formats=())
    checker.checkers = {name: (only_text(holds), ValueError) for name, holds in FORMATS.items()}
    return checker


LINEAR_RULES: Mapping[str, Any] = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "uniqueItems": _unique_items,
}
"""The stock rules match with Python's own engine, which a text can keep busy for years, or take the square of the
time."""
_Validator: Any = extend(
    Draft202012Validator,
    {"$ref": _reference, "multipleOf": _multiple_of, **LINEAR_RULES},
    format_checker=_format_checker(),
)


def _misfit(error: ValidationError) -> Misfit:
    place = "".join(f"/{escaped(str(part))}" for part in error.absolute_path)
    message = error.message if len(error.message) <= 300 else f"{error.message[:100]} … {error.message[-200:]}"
    return Misfit(f"{place}: {message}." if place else f"{message}.", place, str(error.validator))
