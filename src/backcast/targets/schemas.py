"""The wanted shape of an answer: a name out of a closed list or a JSON Schema (2020-12), made one plain schema.

Decides what may be wanted and whether a value is it. Targets come from strangers: nothing in them is imported, run or
fetched, every keyword means what it says or is refused by name, and no pattern takes more than linear time.
"""

import functools
import ipaddress
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time
from fractions import Fraction
from time import thread_time
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend
from pydantic import AnyUrl
from pydantic_core import SchemaError, SchemaValidator, core_schema, from_json, to_json, to_jsonable_python

from backcast.errors import FieldError, InvalidTarget
from backcast.models import JSON

Schema = dict[str, JSON]

SIZE = 64 * 1024
"""Bytes of a schema as it is sent."""
EXPANDED = 256 * 1024
"""Characters of a schema once its references are written out; models read all of them."""
NODES = 2_000
"""Schemas inside a schema once its references are written out."""
DEPTH = 32
"""How deep schemas may be nested in each other, references included."""
PATTERNS = 16
"""Different patterns in one schema: compiled, each may take 10 MB."""
COMPILING = 0.2
"""Seconds of CPU for the patterns of one schema; an honest one takes less than a thousandth."""
_NAME = 200
"""Characters of a name; bounds the nesting too."""


@dataclass(frozen=True)
class Target:
    """A wanted shape: a label for logs, its plain schema without references, and the check of a value."""

    name: str
    schema: Schema = field(repr=False)

    def validate(self, value: JSON) -> JSON:
        """The value as plain JSON (dates become ISO strings, 3.0 stays a valid integer as JSON Schema has it).

        Raises:
            ValueError: it does not have the shape; the sentence says where.
        """
        try:
            plain = to_jsonable_python(value)
            json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()  # NaN and lone surrogates are no JSON
            error = best_match(self._validator.iter_errors(plain))
        except (RecursionError, OverflowError) as error:
            raise ValueError(f"The value can't be checked: {error}.") from None
        if error is not None:
            raise ValueError(_sentence(error))
        return plain

    @functools.cached_property
    def _validator(self) -> Draft202012Validator:
        return _Validator(self.schema, format_checker=_Validator.FORMAT_CHECKER)


def parse(target: JSON, *, pointer: str = "/target") -> Target:
    """The target that a caller wrote as a name, as a JSON Schema, or as a JSON Schema in a text.

    Raises:
        InvalidTarget: with the place of what is wrong, below `pointer`.
    """
    try:
        if isinstance(target, str) and not target.lstrip().startswith("{"):
            return _named(target)
        if not isinstance(target, str | dict):
            raise _Refused("", f"a target is one of the names {_WORKING}; or a JSON Schema")
        try:
            text = target.encode() if isinstance(target, str) else to_json(target, inf_nan_mode="constants")
        except ValueError as error:
            raise _Refused("", f"the schema is not plain JSON ({error})") from None
        if len(text) > SIZE:
            raise _Refused("", f"the schema has {len(text)} bytes; up to {SIZE} are taken")
        return _described(text)
    except _Refused as refused:
        place = pointer + refused.place
        raise InvalidTarget(f"{place}: {refused}.", errors=(FieldError(place, str(refused)),)) from None


class _Refused(Exception):
    def __init__(self, place: str, sentence: str) -> None:
        super().__init__(sentence)
        self.place = place


# -- names ---------------------------------------------------------------------------------------------------------

_SCALARS: Mapping[str, Schema] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "str": {"type": "string"},
    "date": {"type": "string", "format": "date"},
    "datetime": {"type": "string", "format": "date-time"},
    "time": {"type": "string", "format": "time"},
    "UUID": {"type": "string", "format": "uuid"},
    "list": {"type": "array"},
    "dict": {"type": "object"},
    "None": {"type": "null"},
    "Any": {},
}
_SPELLINGS: Mapping[str, str] = {
    **{f"builtins.{name}": name for name in ("int", "float", "bool", "str", "list", "dict")},
    **{f"datetime.{name}": name for name in ("date", "datetime", "time")},
    **{f"{module}{name}": name.lower() for module in ("typing.", "") for name in ("List", "Dict")},
    **{f"typing.{name}": name for name in ("Any", "Optional", "Union")},
    "uuid.UUID": "UUID",
    "uuid": "UUID",
}
_WORKING = "int, float, bool, str, date, datetime, time, UUID, list, dict, list[…], dict[str, …], … | None, Optional[…]"
_WORD = re.compile(r"\s*([A-Za-z_.]+|[\[\],|])\s*")


@functools.lru_cache(maxsize=128)
def _named(text: str) -> Target:
    unknown = _Refused("", f"{text[:_NAME]!r} is not a target. The names that work: {_WORKING}; or a JSON Schema")
    if len(text) > _NAME:
        raise _Refused("", f"a name has up to {_NAME} characters. The names that work: {_WORKING}; or a JSON Schema")
    words, at = list[str](), 0
    while found := _WORD.match(text, at):
        words.append(_SPELLINGS.get(found[1], found[1]))
        at = found.end()
    if at < len(text):
        raise unknown
    words.reverse()

    def take(word: str) -> bool:
        return bool(words) and words[-1] == word and bool(words.pop())

    def union() -> Schema:
        members = [one()]
        while take("|"):
            members.append(one())
        return _any_of(members)

    def one() -> Schema:
        name, arguments = words.pop(), list[Schema]()
        if take("["):
            arguments.append(union())
            while take(","):
                arguments.append(union())
            if not take("]"):
                raise unknown
        match name, arguments:
            case "list", [items]:
                return {"type": "array", "items": items}
            case "dict", [key, values] if key == _SCALARS["str"]:  # JSON has no other keys
                return {"type": "object", "additionalProperties": values}
            case "Optional", [wanted]:
                return _any_of([wanted, _SCALARS["None"]])
            case "Union", [_, *_]:
                return _any_of(arguments)
            case _, [] if name in _SCALARS:
                return _SCALARS[name]
            case _:
                raise unknown

    try:
        schema = union()
    except IndexError:  # the text ended early
        raise unknown from None
    if words:
        raise unknown
    return Target(text.strip(), dict(schema))


def _any_of(members: list[Schema]) -> Schema:
    return members[0] if len(members) == 1 else {"anyOf": members}


# -- schemas -------------------------------------------------------------------------------------------------------

_TYPES = {"null", "boolean", "integer", "number", "string", "array", "object"}


def _is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value) and len(set(value)) == len(value)


def _is_type(value: Any) -> bool:
    return value in _TYPES if isinstance(value, str) else _is_texts(value) and set() < set(value) <= _TYPES


_ONE, _SEVERAL, _BY_NAME = "a schema (an object, true or false)", "a list of schemas", "an object of schemas"
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (_ONE, lambda value: isinstance(value, bool | dict), "items additionalProperties propertyNames"),
    (_SEVERAL, lambda value: isinstance(value, list) and len(value) > 0, "prefixItems anyOf oneOf allOf"),
    (_BY_NAME, lambda value: isinstance(value, dict), "properties $defs definitions"),
    (f"one or several of {', '.join(sorted(_TYPES))}", _is_type, "type"),
    ("a list with at least one value", lambda value: isinstance(value, list) and len(value) > 0, "enum"),
    ("any value", lambda _: True, "const default"),
    (
        "a whole number from 0",
        lambda value: type(value) is int and value >= 0,
        "minLength maxLength minItems maxItems minProperties maxProperties",
    ),
    ("a number", _is_number, "minimum maximum exclusiveMinimum exclusiveMaximum"),
    ("a number above 0", lambda value: _is_number(value) and value > 0, "multipleOf"),
    ("a list of different strings", _is_texts, "required"),
    ("a string", lambda value: isinstance(value, str), "format pattern title description"),
    ("a list", lambda value: isinstance(value, list), "examples"),
    ("true or false", lambda value: isinstance(value, bool), "uniqueItems deprecated readOnly writeOnly"),
)
_KEYWORDS = {keyword: (expected, holds) for expected, holds, keywords in _RULES for keyword in keywords.split()}
"""Every keyword there is here; `x-…` is dropped, another one is refused."""
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_DROPPED = {"$ref", "$schema", "$comment", "$defs", "definitions", "discriminator"}
"""Written out, or without a say in what is valid (`discriminator` is OpenAPI's hint beside `oneOf`)."""
_Pointer = tuple[str, ...]


@functools.lru_cache(maxsize=128)
def _described(text: bytes) -> Target:
    try:
        root = from_json(text, allow_inf_nan=False)  # stops at 200 levels
    except ValueError as error:
        raise _Refused("", f"the schema is not plain JSON ({error})") from None
    schema = _Inlining(root).written_out(root, "", (), 0)
    kind = schema.get("type")
    return Target(kind if isinstance(kind, str) else "enum" if "enum" in schema else "schema", schema)


class _Inlining:
    """One schema on its way to having no references; counts what it grows to."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._nodes = self._size = 0
        self._compiling = 0.0
        self._patterns = set[str]()

    def written_out(self, node: Schema, place: str, references: tuple[_Pointer, ...], depth: int) -> Schema:
        self._nodes += 1
        if depth > DEPTH:
            raise _Refused(place, f"schemas are nested more than {DEPTH} deep")
        if self._nodes > NODES:
            raise _Refused(place, f"the schema has more than {NODES} schemas in it, references written out")

        def inside(child: JSON, *path: str) -> JSON:
            where = place + "".join(f"/{_escaped(part)}" for part in path)
            if isinstance(child, bool):
                return child
            if not isinstance(child, dict):
                raise _Refused(where, f"must be {_ONE}")
            return self.written_out(child, where, references, depth + 1)

        out: Schema = {}
        for keyword, value in node.items():
            if keyword in _DROPPED or keyword.startswith("x-"):
                continue
            self._check(keyword, value, f"{place}/{_escaped(keyword)}")
            match _KEYWORDS[keyword][0]:
                case expected if expected == _ONE:
                    out[keyword] = inside(value, keyword)
                case expected if expected == _SEVERAL:
                    out[keyword] = [inside(child, keyword, str(i)) for i, child in enumerate(value)]
                case expected if expected == _BY_NAME:
                    out[keyword] = {name: inside(child, keyword, name) for name, child in value.items()}
                case _:
                    out[keyword] = value
        return self._merged(node["$ref"], out, f"{place}/$ref", references, depth) if "$ref" in node else out

    def _merged(self, reference: JSON, out: Schema, place: str, references: tuple[_Pointer, ...], depth: int) -> Schema:
        parts, there = self._look_up(reference, place)
        if parts in references or not parts:
            raise _Refused(place, f"{reference[:80]!r} leads back to itself: recursive schemas are not supported")
        if there is False:
            raise _Refused(place, f"{reference[:80]!r} leads to `false`, which no value fits")
        where = "".join(f"/{_escaped(part)}" for part in parts)
        found = {} if there is True else self.written_out(there, where, (*references, parts), depth + 1)
        if out.keys() <= _ANNOTATIONS:  # what stands beside a reference speaks for this place
            return found | out
        return {**out, "allOf": [*out.get("allOf", ()), found]}

    def _look_up(self, reference: JSON, place: str) -> tuple[_Pointer, Any]:
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise _Refused(place, f"{str(reference)[:80]!r} is not followed: only `#/…` inside the schema is")
        parts = tuple(part.replace("~1", "/").replace("~0", "~") for part in unquote(reference[1:]).split("/")[1:])
        node: Any = self._root
        rest = list(reversed(parts))
        try:
            while rest:
                keyword = rest.pop()
                expected, node = _KEYWORDS[keyword][0], node[keyword]
                if expected not in (_ONE, _SEVERAL, _BY_NAME):
                    raise LookupError
                if expected == _SEVERAL:
                    node = dict(zip(map(str, range(len(node))), node, strict=True))
                if expected != _ONE:
                    node = node[rest.pop()]
        except (LookupError, TypeError):
            node = None
        if not isinstance(node, bool | dict):
            raise _Refused(place, f"{reference[:80]!r} leads to no schema")
        return parts, node

    def _check(self, keyword: str, value: JSON, place: str) -> None:
        if keyword not in _KEYWORDS:
            raise _Refused(place, f"the keyword {keyword[:80]!r} is not supported: take it out")
        expected, holds = _KEYWORDS[keyword]
        if not holds(value):
            raise _Refused(place, f"must be {expected}")
        if keyword == "format" and value not in _FORMATS:
            raise _Refused(place, f"the format {value[:80]!r} is not supported; these are: {', '.join(_FORMATS)}")
        if keyword == "pattern" and value not in self._patterns:
            self._patterns.add(value)
            if len(self._patterns) > PATTERNS:
                raise _Refused(place, f"the schema has more than {PATTERNS} different patterns")
            started = thread_time()
            try:
                _compile(value)
            except SchemaError as error:
                why = str(error).strip().splitlines()[-1].split(": ", 1)[-1].rstrip(".")  # the rest is a drawing
                raise _Refused(place, f"the pattern is not a linear-time regular expression: {why}") from None
            self._compiling += thread_time() - started
            if self._compiling > COMPILING:
                raise _Refused(place, "the patterns are too large: say lengths by minLength and maxLength")
        if expected not in (_ONE, _SEVERAL, _BY_NAME):
            try:
                self._size += len(json.dumps(value, allow_nan=False))
            except ValueError:
                raise _Refused(place, "holds a number that is too large for JSON") from None
            if self._size > EXPANDED:
                raise _Refused(place, f"the schema has more than {EXPANDED} characters, references written out")


def _escaped(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")


# -- values --------------------------------------------------------------------------------------------------------


def _compile(pattern: str) -> SchemaValidator:
    """A Rust regular expression: linear time, unanchored and `$` at the very end only, as JSON Schema has it."""
    return SchemaValidator(core_schema.str_schema(pattern=pattern, strict=True))


_compiled = functools.lru_cache(maxsize=PATTERNS)(_compile)


def _pattern(_: Any, pattern: str, value: JSON, __: Any) -> Any:
    if isinstance(value, str) and not _compiled(pattern).isinstance_python(value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _multiple_of(_: Any, step: float, value: JSON, __: Any) -> Any:
    """As written: in binary 19.99 is no multiple of 0.01."""
    if _is_number(value) and Fraction(str(value)) % Fraction(str(step)):
        yield ValidationError(f"{value!r} is not a multiple of {step!r}")


def _shaped(shape: str, check: Callable[[str], Any] = bool) -> Callable[[str], Any]:
    """The shape, and then the calendar: the standard library alone takes more than the shape."""
    expression = re.compile(shape, re.ASCII)
    return lambda value: expression.fullmatch(value) and check(value)


_CLOCK = r"\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?"  # texts seldom tell the zone
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_FORMATS: Mapping[str, Callable[[str], Any]] = {
    "date": _shaped(r"\d{4}-\d\d-\d\d", date.fromisoformat),
    "date-time": _shaped(r"\d{4}-\d\d-\d\d[T ]" + _CLOCK, datetime.fromisoformat),
    "time": _shaped(_CLOCK, time.fromisoformat),
    "duration": _shaped(r"-?P(?=[\dT])(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+(\.\d+)?S)?)?)"),
    "email": _shaped(rf"(?=.{{3,254}}$)[\w.!#$%&'*+/=?^`{{|}}~-]{{1,64}}@{_LABEL}(\.{_LABEL})*"),  # as in HTML forms
    "uri": _shaped(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s\x00-\x1f]+", AnyUrl),
    "uuid": _shaped(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"),
    "hostname": _shaped(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*"),
    "ipv4": _shaped(r"[\d.]+", ipaddress.IPv4Address),
    "ipv6": _shaped(r"[\dA-Fa-f:.]+", ipaddress.IPv6Address),
}


def _format_checker() -> FormatChecker:
    def only_text(holds: Callable[[str], Any]) -> Callable[[object], bool]:
        return lambda value: not isinstance(value, str) or bool(holds(value))

    checker = FormatChecker(formats=())
    checker.checkers = {name: (only_text(holds), ValueError) for name, holds in _FORMATS.items()}
    return checker


_Validator: Any = extend(
    Draft202012Validator,
    {"pattern": _pattern, "multipleOf": _multiple_of},
    format_checker=_format_checker(),
)


def _sentence(error: ValidationError) -> str:
    place = "".join(f"/{_escaped(str(part))}" for part in error.absolute_path)
    message = error.message if len(error.message) <= 300 else f"{error.message[:100]} … {error.message[-200:]}"
    return f"{place}: {message}." if place else f"{message}."
