"""Decides how the parameters of a task are described to callers and filled from their JSON, and which ones no JSON can
fill. A parameter that takes a type (`target: type[T]`, as in Prefect's example) is a target: callers name or describe
the shape.
"""

import contextlib
import inspect
import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from prefect import Task
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter

from backcast.executor.shapes import Shapes
from backcast.models import JSON

_PLAIN = (Any, inspect.Parameter.empty, str, int, float, bool, None, type(None), dict, list)
_TARGET = {"anyOf": [{"type": "string"}, {"type": "object"}], "format": "target"}


class Filler(Protocol):
    """Makes the value of a parameter from JSON. Raises `pydantic.ValidationError` or `InvalidTarget`."""

    def validate_python(self, value: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Parameters:
    schema: dict[str, JSON]
    """JSON Schema of the whole input."""
    fillers: Mapping[str, Filler]
    """Of parameters of types beyond plain JSON (dates, models)."""
    only_default: tuple[str, ...]
    """Parameters that no JSON can fill and that have a default, which they get."""
    unfillable: tuple[str, ...]
    """Parameters that no JSON can fill and that have none: the task can't be served."""


def hints_of(task: "Task[..., Any]") -> dict[str, Any]:
    with contextlib.suppress(Exception):  # annotations may name types that exist for type checkers only
        return typing.get_type_hints(task.fn, include_extras=True)
    return {}


def parameters_of(task: "Task[..., Any]") -> Parameters:
    hints, kinds = hints_of(task), inspect.signature(task.fn).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about defaults that JSON can't hold
        schema: dict[str, JSON] = parameter_schema(task.fn).model_dump_for_openapi()
    schema.setdefault("additionalProperties", False)
    if not schema.get("definitions"):
        schema.pop("definitions", None)
    fillers: dict[str, Filler] = {}
    lost: list[str] = []
    for name, described in list(schema["properties"].items()):
        described.pop("position", None)
        hint = hints.get(name, Any)
        if _takes_type(hint):
            kept = {key: described[key] for key in ("title", "description") if key in described}
            is_optional = type(None) in typing.get_args(hint)
            anyway = [{"type": "null"}] if is_optional else []
            schema["properties"][name] = {**_TARGET, "anyOf": [*_TARGET["anyOf"], *anyway], **kept}
            fillers[name] = Shapes()
        elif hint not in _PLAIN:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    fillers[name] = adapter = TypeAdapter(hint)
                    adapter.json_schema()
            except Exception:  # noqa: BLE001  # pydantic has many ways to say that it can't
                lost.append(name)
                del schema["properties"][name]
                fillers.pop(name, None)
    required = [name for name in schema.get("required", []) if name not in lost]
    schema["required"] = required
    if not required:
        del schema["required"]
    has_default = {name for name, kind in kinds.items() if kind.default is not inspect.Parameter.empty}
    has_default |= {name for name, kind in kinds.items() if kind.kind in (kind.VAR_KEYWORD, kind.VAR_POSITIONAL)}
    return Parameters(
        schema=schema,
        fillers=fillers,
        only_default=tuple(name for name in lost if name in has_default),
        unfillable=tuple(name for name in lost if name not in has_default),
    )


def _takes_type(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return all(_takes_type(one) or one is type(None) for one in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Annotated:
        return _takes_type(typing.get_args(hint)[0])
    return hint is type or typing.get_origin(hint) is type
