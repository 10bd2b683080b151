"""Follows the references of one schema: only inside the schema, and never in a circle that no value can leave.

A schema may lead back to itself by way of its fields or items, as a tree's nodes do: those places are kept as
definitions, and all other references are written out.
"""

import re
from collections.abc import Iterator
from enum import Flag, auto
from typing import Any
from urllib.parse import unquote

from backcast.models import JSON
from backcast.targets.refusal import Refused, escaped
from backcast.targets.validation import Schema

Pointer = tuple[str, ...]

ONE = {"items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else", "additionalItems"}
"""Keywords with a schema as their value."""
SEVERAL = {"prefixItems", "anyOf", "oneOf", "allOf"}
BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}
_SAME_VALUE = {"anyOf", "oneOf", "allOf", "not", "if", "then", "else"}
"""Keywords whose schemas are about the same value, not about a part of it."""


class _Way(Flag):
    """From a schema to a reference inside."""

    SAME = auto()
    """The reference is about the same value."""
    ALWAYS = auto()
    """Every value of the schema has to fit the reference, by itself or by a part that it must have."""


REFERENCES = 400
"""Different references in one schema."""


class References:
    """The references of one schema. Making it finds those that lead back to themselves.

    Raises:
        Refused: a reference leads nowhere, out of the schema, or back to itself without an end.
    """

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._names: dict[Pointer, str] = {}
        inside: dict[Pointer, dict[Pointer, _Way]] = {}
        waiting: list[Pointer] = []

        def look(node: JSON, place: str) -> dict[Pointer, _Way]:
            """The references in a schema, and the ways to them."""
            found: dict[Pointer, _Way] = {}
            for reference, where, way in _references(node, place, _Way.SAME | _Way.ALWAYS):
                pointer, _ = self.look_up(reference, where)
                found[pointer] = found.get(pointer, _Way(0)) | way
                if pointer not in inside and pointer not in waiting:
                    waiting.append(pointer)
                    if len(waiting) + len(inside) > REFERENCES:
                        raise Refused(where, f"the schema has more than {REFERENCES} different references")
            return found

        look(root, "")
        while waiting:
            pointer = waiting.pop()
            inside[pointer] = {}
            inside[pointer] = look(self._find(pointer), _written(pointer))
        for pointer in inside:
            if any(pointer in _reachable(pointer, inside, way) for way in _Way):
                place = f"{_written(pointer)}/$ref"
                raise Refused(place, f"{'#' + _written(pointer)!r} leads back to itself without an end")
            if pointer in _reachable(pointer, inside, _Way(0)):
                self._name(pointer)

    @property
    def recursive(self) -> dict[Pointer, str]:
        """The places that lead back to themselves, with the names of their definitions."""
        return self._names

    def look_up(self, reference: JSON, place: str) -> tuple[Pointer, bool | Schema]:
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise Refused(place, f"{str(reference)[:80]!r} is not followed: only `#/…` inside the schema is")
        parts = tuple(part.replace("~1", "/").replace("~0", "~") for part in unquote(reference[1:]).split("/")[1:])
        found = self._find(parts)
        if not isinstance(found, bool | dict):
            raise Refused(place, f"{reference[:80]!r} leads to no schema")
        if found is False:
            raise Refused(place, f"{reference[:80]!r} leads to `false`, which no value fits")
        return parts, found

    def _find(self, pointer: Pointer) -> Any:
        node: Any = self._root
        rest = list(reversed(pointer))
        try:
            while rest:
                keyword = rest.pop()
                if keyword == "components" and node is self._root:  # as in an OpenAPI document
                    node = node["components"][rest.pop()][rest.pop()]
                elif keyword == "items" and isinstance(node["items"], list):
                    node = dict(zip(map(str, range(len(node["items"]))), node["items"], strict=True))[rest.pop()]
                elif keyword in ONE:
                    node = node[keyword]
                elif keyword in SEVERAL:
                    node = dict(zip(map(str, range(len(node[keyword]))), node[keyword], strict=True))[rest.pop()]
                elif keyword in BY_NAME:
                    node = node[keyword][rest.pop()]
                else:
                    return None
        except (LookupError, TypeError):
            return None
        return node

    def _name(self, pointer: Pointer) -> None:
        name = pointer[-1] if pointer and re.fullmatch(r"[A-Za-z_][\w.-]{0,60}", pointer[-1]) else "root"
        taken = set(self._names.values())
        self._names[pointer] = next(n for i in range(len(taken) + 1) if (n := f"{name}{i or ''}") not in taken)


def _reachable(start: Pointer, inside: dict[Pointer, dict[Pointer, _Way]], way: _Way) -> set[Pointer]:
    seen: set[Pointer] = set()
    waiting = [start]
    while waiting:
        for pointer, ways in inside[waiting.pop()].items():
            if pointer not in seen and way in ways:
                seen.add(pointer)
                waiting.append(pointer)
    return seen


def _references(node: JSON, place: str, way: _Way) -> Iterator[tuple[JSON, str, _Way]]:
    """Every reference in a schema, with its place and the way to it. Definitions count when something leads to
    them."""
    if not isinstance(node, dict):
        return
    if node.get("nullable") is True:
        way &= _Way.SAME
    if "$ref" in node:
        yield node["$ref"], f"{place}/$ref", way
    for keyword, value in node.items():
        if keyword in ONE and isinstance(value, dict):
            yield from _references(value, f"{place}/{keyword}", way & _inner(node, keyword))
        elif (keyword in SEVERAL or keyword == "items") and isinstance(value, list):
            for i, each in enumerate(value):
                yield from _references(each, f"{place}/{keyword}/{i}", way & _inner(node, keyword, i))
        elif keyword in ("properties", "patternProperties") and isinstance(value, dict):
            needed = _required(node) if keyword == "properties" else ()
            for name, each in value.items():
                inner = _Way.ALWAYS if name in needed else _Way(0)
                yield from _references(each, f"{place}/{keyword}/{escaped(name)}", way & inner)


def _inner(node: Schema, keyword: str, at: int = 0) -> _Way:
    """The way from a schema, of which nothing is checked yet, to the one under this keyword, `properties` excepted."""
    if keyword in _SAME_VALUE:
        return _Way.SAME | _Way.ALWAYS if keyword == "allOf" else _Way.SAME
    if keyword not in ("items", "prefixItems", "contains") or node.get("type") not in ("array", ["array"]):
        return _Way(0)
    before = node.get("prefixItems")
    if keyword == "items" and isinstance(before, list):
        at += len(before)
    least = node.get("minContains", 1) if keyword == "contains" else node.get("minItems")
    return _Way.ALWAYS if isinstance(least, int) and least > at else _Way(0)


def _required(node: Schema) -> set[str]:
    required = node.get("required")
    if node.get("type") not in ("object", ["object"]) or not isinstance(required, list):
        return set()
    return {each for each in required if isinstance(each, str)}


def _written(pointer: Pointer) -> str:
    return "".join(f"/{escaped(part)}" for part in pointer)
