"""Targets by name: a closed list, with the spellings of Python's annotations. Nothing is imported."""

import functools
import re
from collections.abc import Mapping

from backcast.targets.refusal import Refused
from backcast.targets.validation import Schema, Target

_NAME = 200
"""Characters of a name; bounds the nesting too."""

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
NAMES = "int, float, bool, str, date, datetime, time, UUID, list, dict, list[…], dict[str, …], … | None, Optional[…]"
_WORD = re.compile(r"\s*([A-Za-z_.]+|[\[\],|])\s*")


@functools.lru_cache(maxsize=128)
def named(text: str) -> Target:
    unknown = Refused("", f"{text[:_NAME]!r} is not a target. The names that work: {NAMES}; or a JSON Schema")
    if len(text) > _NAME:
        raise Refused("", f"a name has up to {_NAME} characters. The names that work: {NAMES}; or a JSON Schema")
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
