"""Targets by JSON Schema: one plain schema, its references written out, of keywords that are checked or refused."""

import functools
import json
import re
from collections.abc import Callable
from time import thread_time
from typing import Any
from urllib.parse import unquote

from pydantic_core import SchemaError, from_json

from backcast.models import JSON
from backcast.targets.refusal import Refused
from backcast.targets.validation import FORMATS, PATTERNS, Schema, Target, compile_pattern, escaped, is_number

EXPANDED = 256 * 1024
"""Characters of a schema once its references are written out; models read all of them."""
NODES = 2_000
"""Schemas inside a schema once its references are written out."""
DEPTH = 32
"""How deep schemas may be nested in each other, references included."""
COMPILING = 0.2
"""Seconds of CPU for the patterns of one schema; an honest one takes less than a thousandth."""

_TYPES = {"null", "boolean", "integer", "number", "string", "array", "object"}


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
    ("a number", is_number, "minimum maximum exclusiveMinimum exclusiveMaximum"),
    ("a number above 0", lambda value: is_number(value) and value > 0, "multipleOf"),
    ("a list of different strings", _is_texts, "required"),
    ("a string", lambda value: isinstance(value, str), "format pattern title description"),
    ("a list", lambda value: isinstance(value, list), "examples"),
    ("true or false", lambda value: isinstance(value, bool), "uniqueItems deprecated readOnly writeOnly"),
)
_KEYWORDS = {keyword: (expected, holds) for expected, holds, keywords in _RULES for keyword in keywords.split()}
"""Every supported keyword; `x-…` is dropped, any other one is refused."""
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_DROPPED = {"$ref", "$schema", "$comment", "$defs", "definitions", "discriminator"}
"""Written out, or without effect on validity (`discriminator` is OpenAPI's hint beside `oneOf`)."""
_Pointer = tuple[str, ...]


@functools.lru_cache(maxsize=128)
def described(text: bytes) -> Target:
    try:
        root = from_json(text, allow_inf_nan=False)  # stops at 200 levels
    except ValueError as error:
        raise Refused("", f"the schema is not plain JSON ({error})") from None
    schema = _Inlining(root).written_out(root, "", (), 0)
    kind = schema.get("type")
    return Target(kind if isinstance(kind, str) else "enum" if "enum" in schema else "schema", schema)


class _Inlining:
    """Writes out the references of one schema, and counts how much it grows."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._nodes = self._size = 0
        self._compiling = 0.0
        self._patterns = set[str]()

    def written_out(self, node: Schema, place: str, references: tuple[_Pointer, ...], depth: int) -> Schema:
        self._nodes += 1
        if depth > DEPTH:
            raise Refused(place, f"schemas are nested more than {DEPTH} deep")
        if self._nodes > NODES:
            raise Refused(place, f"the schema has more than {NODES} schemas in it, references written out")

        def inside(child: JSON, *path: str) -> JSON:
            where = place + "".join(f"/{escaped(part)}" for part in path)
            if isinstance(child, bool):
                return child
            if not isinstance(child, dict):
                raise Refused(where, f"must be {_ONE}")
            return self.written_out(child, where, references, depth + 1)

        out: Schema = {}
        for keyword, value in node.items():
            if keyword in _DROPPED or keyword.startswith("x-"):
                continue
            self._check(keyword, value, f"{place}/{escaped(keyword)}")
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
            raise Refused(place, f"{reference[:80]!r} leads back to itself: recursive schemas are not supported")
        if there is False:
            raise Refused(place, f"{reference[:80]!r} leads to `false`, which no value fits")
        where = "".join(f"/{escaped(part)}" for part in parts)
        found = {} if there is True else self.written_out(there, where, (*references, parts), depth + 1)
        if out.keys() <= _ANNOTATIONS:  # annotations beside a reference override those behind it
            return found | out
        return {**out, "allOf": [*out.get("allOf", ()), found]}

    def _look_up(self, reference: JSON, place: str) -> tuple[_Pointer, Any]:
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise Refused(place, f"{str(reference)[:80]!r} is not followed: only `#/…` inside the schema is")
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
            raise Refused(place, f"{reference[:80]!r} leads to no schema")
        return parts, node

    def _check(self, keyword: str, value: JSON, place: str) -> None:
        if keyword not in _KEYWORDS:
            raise Refused(place, f"the keyword {keyword[:80]!r} is not supported: take it out")
        expected, holds = _KEYWORDS[keyword]
        if not holds(value):
            raise Refused(place, f"must be {expected}")
        if keyword == "format" and value not in FORMATS:
            raise Refused(place, f"the format {value[:80]!r} is not supported; these are: {', '.join(FORMATS)}")
        if keyword == "pattern" and value not in self._patterns:
            self._patterns.add(value)
            if len(self._patterns) > PATTERNS:
                raise Refused(place, f"the schema has more than {PATTERNS} different patterns")
            started = thread_time()
            try:
                compile_pattern(value)
            except SchemaError as error:
                why = str(error).strip().splitlines()[-1].split(": ", 1)[-1].rstrip(".")  # the rest is a drawing
                raise Refused(place, f"the pattern is not a linear-time regular expression: {why}") from None
            self._compiling += thread_time() - started
            if self._compiling > COMPILING:
                raise Refused(place, "the patterns are too large: limit lengths by minLength and maxLength")
        if expected not in (_ONE, _SEVERAL, _BY_NAME):
            try:
                self._size += len(json.dumps(value, allow_nan=False))
            except ValueError:
                raise Refused(place, "holds a number that is too large for JSON") from None
            if self._size > EXPANDED:
                raise Refused(place, f"the schema has more than {EXPANDED} characters, references written out")
