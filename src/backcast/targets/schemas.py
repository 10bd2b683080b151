"""Targets by JSON Schema: one plain schema of keywords that are checked or refused, its references written out."""

import functools
import json
from collections.abc import Callable
from time import thread_time
from typing import Any

from pydantic_core import from_json

from backcast.models import JSON
from backcast.targets.dialects import ANNOTATIONS, modern, nullable
from backcast.targets.patterns import PATTERNS, PatternError, compile_pattern
from backcast.targets.references import BY_NAME, ONE, SEVERAL, References
from backcast.targets.refusal import Refused, escaped
from backcast.targets.validation import Schema, Target, is_number

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


def _is_texts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_texts, value.values()))


def _is_type(value: Any) -> bool:
    return value in _TYPES if isinstance(value, str) else _is_texts(value) and set() < set(value) <= _TYPES


_ONE, _SEVERAL, _BY_NAME = "a schema (an object, true or false)", "a list of schemas", "an object of schemas"
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        _ONE,
        lambda value: isinstance(value, bool | dict),
        "items additionalProperties propertyNames contains not if then else",
    ),
    (_SEVERAL, lambda value: isinstance(value, list) and len(value) > 0, "prefixItems anyOf oneOf allOf"),
    (_BY_NAME, lambda value: isinstance(value, dict), "properties patternProperties $defs definitions"),
    (f"one or several of {', '.join(sorted(_TYPES))}", _is_type, "type"),
    ("a list with at least one value", lambda value: isinstance(value, list) and len(value) > 0, "enum"),
    ("any value", lambda _: True, "const default"),
    (
        "a whole number from 0",
        lambda value: type(value) is int and value >= 0,
        "minLength maxLength minItems maxItems minProperties maxProperties minContains maxContains",
    ),
    ("a number", is_number, "minimum maximum exclusiveMinimum exclusiveMaximum"),
    ("a number above 0", lambda value: is_number(value) and value > 0, "multipleOf"),
    ("a list of different strings", _is_texts, "required"),
    ("an object of lists of strings", _is_texts_by_name, "dependentRequired"),
    (
        "a string",
        lambda value: isinstance(value, str),
        "format pattern title description contentMediaType contentEncoding",
    ),
    ("a list", lambda value: isinstance(value, list), "examples"),
    ("true or false", lambda value: isinstance(value, bool), "uniqueItems deprecated readOnly writeOnly nullable"),
)
_KEYWORDS = {keyword: (expected, holds) for expected, holds, keywords in _RULES for keyword in keywords.split()}
"""Every supported keyword; `x-…` is dropped, any other one is refused."""
_DROPPED = {
    "$ref",
    "$schema",
    "$comment",
    "$defs",
    "definitions",
    "components",
    "nullable",
    "discriminator",
    "example",
} | {
    "externalDocs",
    "xml",
    "contentSchema",
}
"""Written out, or without effect on validity (`discriminator` is OpenAPI's hint beside `oneOf`)."""


@functools.lru_cache(maxsize=128)
def described(text: bytes) -> Target:
    try:
        root = from_json(text, allow_inf_nan=False)  # stops at 200 levels
    except ValueError as error:
        raise Refused("", f"the schema is not plain JSON ({error})") from None
    schema = _Inlining(root).whole()
    kind = schema.get("type")
    return Target(kind if isinstance(kind, str) else "enum" if "enum" in schema else "schema", schema)


class _Inlining:
    """Writes out the references of one schema, and counts how much it grows."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._references = References(root)
        self._nodes = self._size = 0
        self._compiling = 0.0
        self._patterns = set[str]()

    def whole(self) -> Schema:
        names = self._references.recursive
        if () in names:
            out: Schema = {"$ref": f"#/$defs/{names[()]}"}
        else:
            root = {key: value for key, value in self._root.items() if key not in ("$id", "id")}  # nothing refers to it
            out = self.written_out(root, "", 0)
        if names:
            out["$defs"] = {}
            for pointer, name in names.items():
                where = "".join(f"/{escaped(part)}" for part in pointer)
                out["$defs"][name] = self.written_out(self._references.look_up("#" + where, "")[1], where, 0)
        return out

    def written_out(self, node: bool | Schema, place: str, depth: int) -> Schema:
        self._nodes += 1
        if depth > DEPTH:
            raise Refused(place, f"schemas are nested more than {DEPTH} deep")
        if self._nodes > NODES:
            raise Refused(place, f"the schema has more than {NODES} schemas in it, references written out")
        if isinstance(node, bool):
            return {}

        def inside(child: JSON, *path: str) -> JSON:
            where = place + "".join(f"/{escaped(part)}" for part in path)
            if isinstance(child, bool):
                return child
            if not isinstance(child, dict):
                raise Refused(where, f"must be {_ONE}")
            return self.written_out(child, where, depth + 1)

        out: Schema = {}
        for keyword, value in modern(node).items():
            if keyword == "nullable" or (keyword not in _DROPPED and not keyword.startswith("x-")):
                self._check(keyword, value, f"{place}/{escaped(keyword)}")
            if keyword in _DROPPED or keyword.startswith("x-"):
                continue
            if keyword in ONE:
                out[keyword] = inside(value, keyword)
            elif keyword in SEVERAL:
                out[keyword] = [inside(child, keyword, str(i)) for i, child in enumerate(value)]
            elif keyword in BY_NAME:
                out[keyword] = {name: inside(child, keyword, name) for name, child in value.items()}
            else:
                out[keyword] = value
        if "$ref" in node:
            out = self._merged(node["$ref"], out, f"{place}/$ref", depth)
        return nullable(out) if node.get("nullable") is True else out

    def _merged(self, reference: JSON, out: Schema, place: str, depth: int) -> Schema:
        pointer, there = self._references.look_up(reference, place)
        if (name := self._references.recursive.get(pointer)) is not None:
            return {"$ref": f"#/$defs/{name}", **out}
        where = "".join(f"/{escaped(part)}" for part in pointer)
        found = self.written_out(there, where, depth + 1)
        if out.keys() <= ANNOTATIONS:  # annotations beside a reference override those behind it
            return found | out
        return {**out, "allOf": [*out.get("allOf", ()), found]}

    def _check(self, keyword: str, value: JSON, place: str) -> None:
        if keyword not in _KEYWORDS:
            raise Refused(place, f"the keyword {keyword[:80]!r} is not supported: take it out")
        expected, holds = _KEYWORDS[keyword]
        if not holds(value):
            raise Refused(place, f"must be {expected}")
        for pattern in [value] if keyword == "pattern" else value if keyword == "patternProperties" else ():
            self._check_pattern(pattern, place)
        if keyword not in ONE | SEVERAL | BY_NAME:
            try:
                self._size += len(json.dumps(value, allow_nan=False))
            except ValueError:
                raise Refused(place, "holds a number that is too large for JSON") from None
            if self._size > EXPANDED:
                raise Refused(place, f"the schema has more than {EXPANDED} characters, references written out")

    def _check_pattern(self, pattern: str, place: str) -> None:
        if pattern not in self._patterns:
            self._patterns.add(pattern)
            if len(self._patterns) > PATTERNS:
                raise Refused(place, f"the schema has more than {PATTERNS} different patterns")
            started = thread_time()
            try:
                compile_pattern(pattern)
            except PatternError as error:
                raise Refused(place, f"the pattern can't be used: {error}") from None
            self._compiling += thread_time() - started
            if self._compiling > COMPILING:
                raise Refused(place, "the patterns are too large: limit lengths by minLength and maxLength")
