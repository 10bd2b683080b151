"""Supervises what a process does beside its requests and runs: no failure ends such work, and none goes unseen. Each
reason is logged once, an error that is not an outage with its traceback, and the work is done again.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import NoReturn

from backcast.errors import ConfigurationError, Unavailable
from backcast.process.outages import Outage, backoff

log = logging.getLogger("backcast.background")

Step = Callable[[], Awaitable[object]]
Outages = tuple[type[Exception], ...]

_STEADY = 60.0
"""Seconds after which a failure is a new one and not the last one again."""


class _Failures:
    """A context that logs an exception and ends it."""

    def __init__(self, name: str, outages: Outages = (Unavailable,), *, passes: Outages = ()) -> None:
        self._outages, self._passes = outages, passes
        self._outage = Outage(partial(log.warning, "can't %s, trying again: %s", name))

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is None:
            self.ended()
        if not isinstance(error, Exception) or isinstance(error, self._passes):
            return False
        self._outage.failed(error, exc_info=None if isinstance(error, (*self._outages, ConfigurationError)) else error)
        return True

    def ended(self) -> None:
        self._outage.ended()


async def repeat(name: str, step: Step, every: float, *, outages: Outages = (Unavailable,)) -> NoReturn:
    """Do a step for ever, `every` so many seconds, whether it fails or not."""
    failures = _Failures(name, outages)
    while True:
        with failures:
            await step()
        await asyncio.sleep(every)


async def keep(name: str, work: Step) -> None:
    """Do work that is to go on for ever: when it fails, begin again, ever more slowly. Returns when it returns.

    Raises:
        ConfigurationError: the work has raised it, and only a person can mend it.
    """
    failures, delays = _Failures(name, passes=(ConfigurationError,)), backoff(1.0, 30.0)
    while True:
        began = time.monotonic()
        with failures:
            await work()
            return
        if time.monotonic() - began > _STEADY:
            failures.ended()
            delays = backoff(1.0, 30.0)
        await asyncio.sleep(next(delays))


class OnDemand:
    """Does a step whenever it is asked for, never twice at once. Asked for meanwhile, it does the step once more, after
    a pause of so many seconds."""

    def __init__(self, name: str, step: Step, pause: Callable[[], float] = float) -> None:
        self._step, self._pause = step, pause
        self._failures = _Failures(name)
        self._asked = False
        self._task: asyncio.Task[None] | None = None

    def ask(self) -> None:
        self._asked = True
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._asked:
                self._asked = False
                with self._failures:
                    await self._step()
                await asyncio.sleep(self._pause())
        finally:
            self._task = None

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
