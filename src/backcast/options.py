"""The two calls for authors of tasks: `options` sets how backcast treats a task, `cancel_requested` asks about a stop.

Knows nothing of Prefect and needs no worker: a task that uses it runs anywhere.
"""

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Never, TypeVar, get_args

from backcast import names
from backcast.errors import refuse_unknown

History = Literal["full", "none"]
"""`full`: Prefect shows every run of the task. `none`: it shows none, and the function is called without Prefect's
engine where nothing needs it, which is cheap; the ledger still has every run."""

Isolation = Literal["none", "process"]
"""`none`: its runs share the executors of their worker. `process`: each has a fresh process of its own, which is ended
with it, and at once when its time is over or it is cancelled; that costs about a second of processor time a run."""

T = TypeVar("T")
_MARK = "__backcast_options__"
_requested: ContextVar[threading.Event | None] = ContextVar("backcast_cancel_requested", default=None)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a task, as set with `options`."""

    history: History = "full"
    lane: str | None = None
    isolation: Isolation = "none"
    may_block: float | None = None


def options(
    *,
    history: History = "full",
    lane: str | None = None,
    isolation: Isolation = "none",
    may_block: float | None = None,
    **unknown: Never,
) -> Callable[[T], T]:
    """Set how backcast treats a task; it stays the same task for all other code.

        @options(history="none", lane="openai")
        @task(retries=3)
        async def classify(text: str) -> str: ...

    Above `@task` it applies to that one task; below, on the function, also to every copy by `with_options`.

    Args:
        history: `none` keeps the runs out of Prefect: it shows neither their states nor their logs. A task with a cache
            policy, hooks, assets or a name for its runs has them all the same; any other is called without Prefect's
            engine, for about a third of the processor time. Retries, time-outs, results and the run's own log are the
            same.
        lane: the lane of the runs, such as a provider's quota, unless a submission names another one.
        isolation: `process` gives each run a process of its own: for code that crashes, leaks, or can't be interrupted.
        may_block: seconds for which a run may keep its process from answering, if that is longer than the setting
            `worker.stall`: for code that holds the interpreter's lock, or blocks the event loop, on purpose.
    """
    refuse_unknown("options", unknown, Options.__slots__)
    if history not in get_args(History):
        raise ValueError(f"history is {history!r}: write 'full' or 'none'.")
    if lane is not None:
        try:
            names.check(lane)
        except ValueError as error:
            raise ValueError(f"lane is {lane!r}: {error}.") from None
    if isolation not in get_args(Isolation):
        raise ValueError(f"isolation is {isolation!r}: write 'none' or 'process'.")
    if may_block is not None and not 0 < may_block <= 86400:
        raise ValueError(f"may_block is {may_block!r}: write seconds, at most 86400.")
    chosen = Options(history, lane, isolation, may_block)

    def mark(task: T) -> T:
        setattr(task, _MARK, chosen)
        return task

    return mark


def options_of(task: Any) -> Options:
    """The options of a task, or of the function that it was made from."""
    return getattr(task, _MARK, None) or getattr(getattr(task, "fn", None), _MARK, None) or Options()


def cancel_requested() -> bool:
    """Whether the run that this code belongs to should stop: it was cancelled, took too long, or its worker stops.

    Python can't stop a thread, so a long sync task asks now and then, and returns or raises: its value is no longer
    needed. An async task is cancelled at its next `await`; the threads that it started may ask. Outside of a run: no.
    """
    requested = _requested.get()
    return requested is not None and requested.is_set()


def stoppable() -> threading.Event:
    """Called in the context of a run: once the event is set, `cancel_requested` is true there."""
    _requested.set(requested := threading.Event())
    return requested
