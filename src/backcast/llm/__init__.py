"""Casts data to a target with the model of this process. Knows the model and the collection of its usage; `casting`
knows Marvin.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from backcast.errors import FatalError, UsageError
from backcast.models import JSON
from backcast.settings import Model
from backcast.targets import Target


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of one answer, as the provider counts them."""

    model: str
    input_tokens: int
    output_tokens: int


_model: Model | None = None
_casting: Any = None
_meter: ContextVar[list[Usage] | None] = ContextVar("backcast_llm_meter", default=None)


def connect(model: Model) -> Model:
    """Choose the process's model. Nothing is opened before the first cast."""
    global _model
    _model = model
    return model


def connected() -> Model | None:
    """The process's model, if one was chosen."""
    return _model


async def aclose() -> None:
    """Close the running loop's connections."""
    if _casting is not None:
        await _casting.aclose()


@contextmanager
def metered() -> Iterator[list[Usage]]:
    """Collect the usage of every answer inside, also of failed casts and of tasks that are started there."""
    used: list[Usage] = []
    token = _meter.set(used)
    try:
        yield used
    finally:
        _meter.reset(token)


async def cast(data: JSON, target: Target, instructions: str | None = None) -> JSON:
    """`data` as a JSON value of the target's shape.

    Raises:
        RunError: always a subclass, which decides whether a retry can help, with a precise code.
    """
    global _casting
    if _model is None:
        raise FatalError("No model is set up: call backcast.llm.connect first.", code="model_not_connected")
    if target.schema == {"type": "string"} and not instructions:
        raise UsageError(
            "A cast to str needs instructions: describe the text that you want.", code="instructions_missing"
        )
    if _casting is None:  # in a thread: other runs go on while Marvin is imported
        _casting = await asyncio.to_thread(import_module, "backcast.llm.casting")
    return await _casting.cast(_model, data, target, instructions, _record)


def _record(usage: Usage) -> None:
    if (used := _meter.get()) is not None:
        used.append(usage)
