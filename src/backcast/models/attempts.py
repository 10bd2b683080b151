"""How an attempt ended, as the executor reports it and the worker settles it."""

import random
from dataclasses import dataclass
from typing import Literal, Self

from backcast.errors import BackcastError
from backcast.models.values import Problem


@dataclass(frozen=True, slots=True)
class Succeeded:
    """An attempt that returned a value; `body` is its plain JSON in UTF-8."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt after which no other one is made."""

    problem: Problem
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Retry:
    """An attempt that failed, to be made again after `delay` seconds; `retries` counts the retries with that one."""

    problem: Problem
    delay: float
    retries: int
    behind: str | None = None
    """The flight to wait for: another run computes the same value."""
    route: str = ""
    """The route to the workers that can do the run: see `ledger.routing`."""
    counts: bool = False
    """Whether it counts against `max_attempts`, beside its retries: it has ended its executor, or its result can't be
    stored."""
    traceback: str = ""

    @classmethod
    def after_outage(cls, error: BackcastError, retries: int, *, counts: bool = False) -> Self:
        """Spread, or all runs that met the same outage come back at the same moment."""
        return cls(Problem.from_error(error), random.uniform(2.5, 7.5), retries, counts=counts)  # noqa: S311


@dataclass(frozen=True, slots=True)
class Tried:
    """A failed attempt that was followed by another one at once, under the same claim."""

    problem: Problem
    traceback: str
    since: float
    """Seconds between the claim and its start, and its end: about, as the executor does not know the claim."""
    until: float


AttemptResult = Succeeded | Failed | Retry
"""The result of an attempt of a run."""


Reason = Literal["cancelled", "lost", "released"]
"""Why an attempt was stopped: its caller asked, another worker has the run, or this worker stops. It is the message of
the attempt's `CancelledError`."""
