"""Makes a Python type of a target, for tasks that take a type. Nothing is imported: names stand for a closed list of
types, and any other shape becomes a class whose values are plain JSON, checked against the target.
"""

import functools
import hashlib
import json
import typing
from datetime import date, datetime, time
from typing import Any, Literal, Optional, Union
from uuid import UUID

from pydantic_core import core_schema

from backcast import targets
from backcast.models import JSON

_SCALARS: dict[str, Any] = {
    '{"type":"integer"}': int,
    '{"type":"number"}': float,
    '{"type":"boolean"}': bool,
    '{"type":"string"}': str,
    '{"type":"null"}': None,
    '{"type":"array"}': list,
    '{"type":"object"}': dict,
    '{"format":"date","type":"string"}': date,
    '{"format":"date-time","type":"string"}': datetime,
    '{"format":"time","type":"string"}': time,
    '{"format":"uuid","type":"string"}': UUID,
    "{}": Any,
}
_classes: dict[str, type] = {}
"""By name, so that a class is pickled by its name and hashes alike in every process: caches depend on it."""


class Shapes:
    """Fills a parameter that takes a type. Raises `InvalidTarget`."""

    def validate_python(self, value: Any, /) -> Any:
        if value is None:
            return None
        return _type(json.dumps(targets.parse(value, pointer="").schema))


def __getattr__(name: str) -> type:
    try:
        return _classes[name]
    except KeyError:
        raise AttributeError(name) from None


@functools.lru_cache(maxsize=256)
def _type(text: str) -> Any:
    return _made(json.loads(text))


def _made(schema: Any) -> Any:
    if (plain := _text(schema)) in _SCALARS:
        return _SCALARS[plain]
    match schema:
        case {"type": "array", "items": dict(items), **rest} if not rest:
            return list[_made(items)]
        case {"type": "object", "additionalProperties": dict(values), **rest} if not rest:
            return dict[str, _made(values)]
        case {"anyOf": [dict(first), {"type": "null"}], **rest} if not rest:
            return Optional[_made(first)]  # noqa: UP045  # `X | None` is no expression for every X
        case {"anyOf": [*members], **rest} if not rest and all(isinstance(member, dict) for member in members):
            return Union[tuple(_made(member) for member in members)]  # noqa: UP007
        case {"enum": [*values]} if all(isinstance(value, str | int) for value in values) and not {*schema} - {
            "enum",
            "type",
        }:
            return Literal[tuple(values)]
        case _:
            return _class(schema)


def _class(schema: dict[str, JSON]) -> type:
    target = targets.Target("schema", schema)  # it is one already, and may be longer than one that is sent
    # pydantic would look for the targets of references among its own definitions.
    shown = {"description": "as described"} if "$defs" in schema else schema

    def core(*_: Any) -> Any:
        return core_schema.no_info_plain_validator_function(target.validate)

    def json_schema(*_: Any) -> dict[str, JSON]:
        return dict(shown)

    name = f"Shape_{hashlib.sha256(_text(schema).encode()).hexdigest()[:32]}"
    members = {
        "__module__": __name__,
        "__doc__": typing.cast("str", schema.get("description", "A shape that a caller has described.")),
        "__get_pydantic_core_schema__": classmethod(core),
        "__get_pydantic_json_schema__": classmethod(json_schema),
    }
    return _classes.setdefault(name, type(name, (), members))


def _text(schema: Any) -> str:
    return json.dumps(schema, sort_keys=True, separators=(",", ":"))
