"""The schema of an answer as a model's server takes it: `provided` for any provider's tool call, `bounded` for the
embedded model's grammar. Both may allow more than the target does; the answer is checked against the target itself.
"""

import re
from collections.abc import Callable
from typing import Any

from backcast.targets.patterns import LOOK_AROUND

Schema = dict[str, Any]

_STRICT = re.compile(
    r"type|properties|required|additionalProperties|items|enum|const|anyOf|\$ref|\$defs|title|description|pattern|format"
    r"|minimum|maximum|exclusiveMinimum|exclusiveMaximum|multipleOf|minItems|maxItems"
)
"""Keywords that OpenAI's strict mode honours."""
_STRICT_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
_NESTED = 10
"""Levels of schemas inside the outermost object of a strict schema."""
_VALUES, _LETTERS = 1_000, 120_000
"""All its enums' values, and the characters of all its names and values."""
_LONG_ENUM, _LONG_ENUM_LETTERS = 250, 15_000
"""Values of one enum, from which on their characters are limited."""
_GRAMMAR_FORMATS = _STRICT_FORMATS | {"uri"}
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](Z|[+-][01][0-9]:[0-5][0-9])?"
_CLOCKS = {"time": f"^{_CLOCK}$", "date-time": rf"^[0-9]{{4}}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T{_CLOCK}$"}
"""The formats with a time, whose zone a text seldom names; llama.cpp's own formats force the model to invent one."""
_UNTOLD = re.compile(
    r"not|if|then|else|contains|minContains|maxContains|propertyNames|patternProperties|dependentRequired|uniqueItems"
)
"""Keywords that a grammar can't express."""


def wrapped(schema: Schema) -> Schema:
    """An object with the answer as its `result`, as Marvin's tool has it. Definitions move to the root, where their
    references look for them."""
    inner = {key: value for key, value in schema.items() if key != "$defs"}
    outer = {"type": "object", "properties": {"result": inner}, "required": ["result"], "additionalProperties": False}
    return outer | ({"$defs": schema["$defs"]} if "$defs" in schema else {})


def provided(schema: Schema) -> tuple[Schema, bool]:
    """The parameters of the output tool, and whether OpenAI's strict mode takes them. Other modes take any keyword, but
    a list must say what its items are."""
    strict = True

    def visit(node: Schema) -> Schema:
        nonlocal strict
        beside = {key: value for key, value in node.items() if key != "$ref"}
        if "$ref" in node and beside and beside.keys() <= {"title", "description"}:
            return {"anyOf": [{"$ref": node["$ref"]}], **beside}  # strict mode takes nothing beside a reference
        strict = strict and _is_strict(node)
        if "array" not in _kinds(node) or isinstance(node.get("items"), dict):
            return node
        places = [place for place in node.get("prefixItems", []) if isinstance(place, dict)]
        ends = {"maxItems": len(node["prefixItems"])} if node.get("items") is False and "prefixItems" in node else {}
        return {**node, "items": {"anyOf": places} if places else {}, **ends}

    out = _walk(wrapped(schema), visit)
    return out, strict and _is_small(out)


def _is_small(schema: Schema) -> bool:
    """Whether a strict schema is within the limits that OpenAI documents; no target has its 5,000 properties."""
    names, values = list[str](), list[str]()
    waiting = [(schema, 0)]
    while waiting:
        node, depth = waiting.pop()
        choices = [str(each) for each in node.get("enum", ())]
        if depth > _NESTED or (len(choices) > _LONG_ENUM and sum(map(len, choices)) > _LONG_ENUM_LETTERS):
            return False
        properties, definitions = node.get("properties", {}), node.get("$defs", {})
        names += [*properties, *definitions, *([str(node["const"])] if "const" in node else [])]
        values += choices
        inner = (*properties.values(), *definitions.values(), *node.get("anyOf", ()), node.get("items"))
        waiting += [(each, depth + 1) for each in inner if isinstance(each, dict)]
    return len(values) <= _VALUES and sum(map(len, names + values)) <= _LETTERS


def _is_strict(node: Schema) -> bool:
    if not all(map(_STRICT.fullmatch, node)) or ("$ref" in node and len(node) > 1):
        return False
    if not node.keys() & {"type", "anyOf", "$ref"}:
        return False
    if node.get("format", "date") not in _STRICT_FORMATS or LOOK_AROUND.search(node.get("pattern", "")):
        return False
    kinds = _kinds(node)
    if "array" in kinds and not isinstance(node.get("items"), dict):
        return False
    properties = node.get("properties", {})
    return "object" not in kinds or (
        node.get("additionalProperties") is False
        and set(properties) == set(node.get("required", []))
        and all(isinstance(each, dict) for each in properties.values())
    )


def _kinds(node: Schema) -> set[Any]:
    kind = node.get("type")
    return {*kind} if isinstance(kind, list) else {kind}


def bounded(schema: Schema, *, length: int) -> Schema:
    """The schema as a grammar that ends: greedy decoding may repeat itself for ever in an open string or list.

    `length` is in characters; a list may have a tenth of it in items. Booleans in place of schemas, which llama.cpp
    refuses, become "anything". Rules that it ignores (patterns, ranges, conditions) are checked later, in the answer.
    """

    def visit(node: Schema) -> Schema:
        out: Schema = {key: value for key, value in node.items() if not _UNTOLD.fullmatch(key)}
        if out.get("format", "date") not in _GRAMMAR_FORMATS:
            del out["format"]
        kinds = _kinds(out)
        if "string" in kinds and out.get("format") in _CLOCKS and "pattern" not in out:
            out["pattern"] = _CLOCKS[out.pop("format")]
        if LOOK_AROUND.search(out.get("pattern", "")):
            del out["pattern"]
        if "array" in kinds:
            out["maxItems"] = min(out.get("maxItems", length), max(length // 10, out.get("minItems", 0)))
        if "string" in kinds and not {"maxLength", "enum", "const", "format", "pattern"} & out.keys():
            out["maxLength"] = length
        return out

    return _walk(schema, visit, lambda _: {})


def _walk(schema: Any, visit: Callable[[Schema], Schema], other: Callable[[Any], Any] = lambda value: value) -> Any:
    """Visits every schema in a schema, from the outside in; `other` gets those that are true or false."""

    def walk(node: Any) -> Any:
        if not isinstance(node, dict):
            return other(node)
        out = dict(visit(node))
        for key in {"properties", "patternProperties", "$defs"} & out.keys():
            out[key] = {name: walk(each) for name, each in out[key].items()}
        for key in {"anyOf", "oneOf", "allOf", "prefixItems"} & out.keys():
            out[key] = [walk(each) for each in out[key]]
        for key in {"items", "additionalProperties", "not", "contains"} & out.keys():
            if key == "items" or isinstance(out[key], dict):
                out[key] = walk(out[key])
        return out

    return walk(schema)
