"""Casts data to a target with the model of this process. Knows the model and the collection of its usage; `casting`
knows Marvin.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from backcast.errors import FatalError, RunError, UsageError
from backcast.models import JSON
from backcast.process import tracing
from backcast.settings import Model
from backcast.targets import Target

# Marvin reads these when it is imported, and a `.env` of the working directory for those that are not set.
os.environ |= {
    "MARVIN_HOME_PATH": os.sep,  # must exist; nothing is written there
    "MARVIN_DATABASE_URL": "sqlite+aiosqlite://",  # in memory, and empty: conversations are MemoryThreads
    "MARVIN_ENABLE_DEFAULT_PRINT_HANDLER": "false",  # it prints data on stdout
    "MARVIN_LOG_LEVEL": "CRITICAL",  # so do its logs
    "MARVIN_LOG_EVENTS": "false",
    "MARVIN_AGENT_MODEL": "openai:gpt-4o",  # never used; a wrong one fails the import
}

NO_MODEL = (
    "No model is set up here: set BACKCAST_MODEL__API_KEY (and BACKCAST_MODEL__BASE_URL) for a provider, or serve the"
    " embedded model (`backcast model`)."
)


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of one answer, as the provider counts them."""

    model: str
    input_tokens: int
    output_tokens: int
    seconds: float = 0.0
    """From the request to the whole answer."""
    dollars: float = 0.0
    """By the list of genai-prices; 0 if it does not know the provider's address or the model."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A cast that failed, after as many answers as there were."""

    model: str
    code: str


_model: Model | None = None
_casting: Future[Any] | None = None
"""The import of `casting`, once a cast has asked for it."""
_meter: ContextVar[list[Usage | Failure] | None] = ContextVar("backcast_llm_meter", default=None)


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
    if _casting is not None and _casting.done() and not _casting.exception():
        await _casting.result().aclose()


def metered() -> list[Usage | Failure]:
    """Collect what is used in this context from here on, by tasks that are started in it too: each answer, those of
    failed casts included, and each failed cast."""
    used: list[Usage | Failure] = []
    _meter.set(used)
    return used


async def cast(
    data: JSON, target: Target, instructions: str | None = None, show: Callable[[JSON], object] | None = None
) -> JSON:
    """`data` as a JSON value of the target's shape. `show` is called, a few times a second, with what is there of an
    answer while the provider streams it: it is not checked, and another answer may take its place.

    Raises:
        RunError: always a subclass, which decides whether a retry can help, with a precise code.
    """
    global _casting
    if _model is None:
        raise FatalError("No model is set up: call backcast.llm.connect first.", code="model_not_connected")
    if _model.backend == "none":
        raise FatalError(NO_MODEL, code="model_not_set_up")
    if target.needs_instructions and not (instructions or "").strip():
        raise UsageError(
            "A cast to str needs instructions: describe the text that you want.", code="instructions_missing"
        )
    if _casting is None:  # in a thread of its own: other runs go on while Marvin is imported
        _casting = ThreadPoolExecutor(1, "import-marvin").submit(_import_casting)
    try:
        casting = await asyncio.shield(asyncio.wrap_future(_casting))
    except Exception as error:  # noqa: BLE001  # whatever a wrong version raises
        raise FatalError(
            f"Marvin can't be imported ({error}): install the versions that backcast pins.", code="model_unusable"
        ) from None
    try:
        return await casting.cast(_model, data, target, instructions, _record, show)
    except RunError as error:
        _record(Failure("embedded" if _model.embedded else _model.name, error.code))
        raise


def _import_casting() -> Any:
    from backcast.llm import casting

    if tracing.is_on():
        casting.trace()
    return casting


def _record(one: Usage | Failure) -> None:
    if (used := _meter.get()) is not None:
        used.append(one)
