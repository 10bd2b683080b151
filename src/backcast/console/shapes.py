"""Turns what a person writes as a shape into a target: a name, a JSON Schema, or a list such as `name, age, city`."""

import re

from backcast.errors import InvalidInput
from backcast.models import JSON, parse_json

_NAME = re.compile(r"[A-Za-z_][\w -]{0,80}")
_TYPES: dict[str, dict[str, JSON]] = {
    "text": {"type": "string"},
    "str": {"type": "string"},
    "string": {"type": "string"},
    "int": {"type": "integer"},
    "integer": {"type": "integer"},
    "float": {"type": "number"},
    "number": {"type": "number"},
    "bool": {"type": "boolean"},
    "date": {"type": "string", "format": "date"},
    "datetime": {"type": "string", "format": "date-time"},
}
_GUESSES = (
    (re.compile(r"(^|_)(age|year|count|quantity|pieces|number_of_\w+)$"), "int"),
    (re.compile(r"(^|_)(price|amount|total|cost|weight|score|percent)$"), "number"),
    (re.compile(r"^(is|has|was)_"), "bool"),
    (re.compile(r"(^|_)(date|day|birthday|due)$"), "date"),
)
"""What a field without a type holds, by its name; text otherwise."""


def target(text: str) -> JSON:
    """The target that `text` means: a JSON Schema as it is, one name as it is (the API knows the names), and a list of
    fields, each with a type if it has one (`age: int`, `tags: list[str]`), as the schema of an object.

    Raises:
        InvalidInput: it is none of these.
    """
    text = text.strip()
    if text.startswith("{"):
        try:
            return parse_json(text)
        except ValueError as error:
            raise InvalidInput(f"The shape is not JSON: {error}.") from None
    if not text:
        raise InvalidInput(
            "Write a shape: a name such as int, a list of fields such as name, age, city, or a JSON Schema."
        )
    fields = [part.strip() for part in re.split(r"[,\n;]", text) if part.strip()]
    if len(fields) == 1 and ":" not in fields[0] and "," not in text:
        return fields[0]
    properties = dict(map(_field, fields))
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _field(text: str) -> tuple[str, JSON]:
    written, _, kind = (part.strip() for part in text.partition(":"))
    if not _NAME.fullmatch(written):
        raise InvalidInput(f"{written!r} is no name of a field: write letters, digits and underscores.")
    name = re.sub(r"[ -]+", "_", written)
    if not kind:
        kind = next((kind for pattern, kind in _GUESSES if pattern.search(name.lower())), "text")
    if found := re.fullmatch(r"list\[(.+)\]|(.+)\[\]", kind):
        return name, {"type": "array", "items": _type(name, found[1] or found[2])}
    return name, _type(name, kind)


def _type(name: str, kind: str) -> JSON:
    if kind.lower() not in _TYPES:
        raise InvalidInput(f"{name}: there is no type {kind!r} here; take {', '.join(_TYPES)}, or list[…] of one.")
    return _TYPES[kind.lower()]
