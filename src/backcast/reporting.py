"""The two calls with which the code of a task reports while it runs: `progress` and `emit`.

Knows nothing of Prefect and needs no worker: a task that uses them runs anywhere.
"""

import math
from contextvars import ContextVar
from typing import Any, Protocol

MESSAGE = 500
"""Characters of a message that are kept."""
KIND = 100
DROPPED = "backcast.dropped"
"""The kind of the last event of an attempt that has emitted too much: its data is the number of those that it lacks."""


class Reporter(Protocol):
    """Takes the reports of one run, from any thread."""

    def progress(self, fraction: float | None, message: str) -> None: ...

    def emit(self, kind: str, data: Any) -> None: ...

    def log(self, level: str, logger: str, text: str) -> None:
        """Take a line of the run's log; it may have line breaks."""
        ...

    def write(self, stream: str, text: str) -> None:
        """Take what is written to a stream: each line of it is one of the run's log."""
        ...


REPORTER: ContextVar[Reporter | None] = ContextVar("backcast_reporter", default=None)
"""Of the run whose code belongs to this context."""


def progress(fraction: float | None = None, message: str = "") -> None:
    """Report how far the run has come: `progress(0.4, "page 12 of 30")`.

    The newest report counts; a few a second are recorded. From async code, sync tasks, and threads that have the
    context of the run (`asyncio.to_thread` gives it; to others give `contextvars.copy_context().run`). Outside of a
    run: nothing happens.

    Args:
        fraction: the part that is done, from 0 to 1; None when it is not known.
        message: what is being done; its first 500 characters are kept.

    Raises:
        ValueError: `fraction` is not within 0 and 1.
    """
    if fraction is not None and not (math.isfinite(fraction) and 0 <= fraction <= 1):
        raise ValueError(f"fraction is {fraction!r}: write a number from 0 to 1.")
    if (reporter := REPORTER.get()) is not None:
        reporter.progress(None if fraction is None else float(fraction), str(message)[:MESSAGE])


def emit(data: Any, *, kind: str = "output") -> None:
    """Publish a part of the output, or any other event of the run, to those who follow it: `emit({"page": 12})`.

    Events are kept with the run, in their order, attempt by attempt: up to 1,000 of an attempt and 256 KiB in all, of
    32 KiB each. Further ones are dropped and counted. From the same places as `progress`; outside of a run nothing
    happens.

    Args:
        data: plain values, pydantic models or dataclasses.
        kind: a name of your own, of 100 characters at most.

    Raises:
        ValueError: `kind` is empty or too long.
        FatalError: `data` can't be written as JSON.
    """
    if not 0 < len(kind) <= KIND:
        raise ValueError(f"kind is {kind!r}: write a name of 1 to {KIND} characters.")
    if (reporter := REPORTER.get()) is not None:
        reporter.emit(kind, data)
