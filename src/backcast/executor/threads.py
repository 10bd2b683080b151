"""Runs code that may not end when it should: functions in threads, and coroutines. Python can stop neither for certain,
so its caller may stop waiting; what goes on is counted for its run until it ends. Knows nothing of tasks.
"""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, get_args

from backcast.executor.tracking import RUN, end_copy
from backcast.models import Reason
from backcast.process.marks import Marks

T = TypeVar("T")

APART = 32
"""Threads for what code of runs gives to other threads itself, by `asyncio.to_thread`, besides one for each slot."""


class Overdue(Exception):
    """It has exceeded its time limit. Its cause shows where, if it has ended by that."""


class Threads:
    def __init__(self, count: int, marks: Marks | None = None, freed: Callable[[bytes], object] | None = None) -> None:
        """`freed` is called on the loop when the last code of a run ends that `leave` has found.

        All threads start now: where code of a run has used up what the process may have, or traces new threads, one
        that starts later fails, and its function is called by another one or never.
        """
        self._freed, self._loop = freed, asyncio.get_running_loop()
        self._lock = threading.RLock()  # a destructor may come here wherever this allocates
        self._calls = dict[object, bytes | None]()
        """By call: the run whose code it is."""
        self._over = set[bytes]()
        self._pool = _Pool("task", count, self, marks)
        started = threading.Event()
        try:
            for _ in range(count):
                self._pool.submit(started.wait)  # the others are busy, so that another thread starts
        finally:
            started.set()
        self._own = _Pool("engine", count, self)
        type(self._loop).set_default_executor(self._loop, _Pool("apart", count + APART, self))
        # A run that gave the loop a pool of its own, as it may in a program of its own, would give it to all of them.
        vars(self._loop).update(set_default_executor=_ignore, shutdown_default_executor=_ignore_later)

    def goes_on(self, run: bytes) -> bool:
        """Whether code of this run does."""
        with self._lock:
            return run in self._calls.values()

    def leave(self, run: bytes) -> bool:
        """The attempt of this run is over: whether code of it goes on, whose end is to be reported."""
        with self._lock:
            goes_on = run in self._calls.values()
            if goes_on:
                self._over.add(run)
        return goes_on

    def count(self, call: "Future[Any] | asyncio.Task[Any]") -> None:
        """For the run whose context this is, until it is done."""
        with self._lock:
            self._calls[call] = RUN.get()
        call.add_done_callback(self._ended)

    def _ended(self, call: object) -> None:
        with self._lock:
            run = self._calls.pop(call, None)
            is_last = run in self._over and run not in self._calls.values()
            if is_last:
                self._over.discard(run)
        if is_last and self._freed is not None and run is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._freed, run)

    async def run(self, work: Callable[[], T], *, asked: threading.Event, within: float | None = None) -> T:
        """Call `work` in a thread, in a copy of this context. Sets `asked` when the caller stops waiting.

        Args:
            within: seconds, from the start of the function.

        Raises:
            Overdue: after `within` seconds.
            CancelledError: at once, even if the thread goes on; but not because other code has cancelled what it found.
        """
        context, clock, waits = contextvars.copy_context(), asyncio.timeout(None), True

        def start_clock() -> None:
            if waits and within is not None:
                clock.reschedule(self._loop.time() + within)

        def body() -> T:
            if within is not None:
                self._loop.call_soon_threadsafe(start_clock)
            return context.run(work)

        call = self._pool.submit(body)
        thread = asyncio.wrap_future(call)
        try:
            async with clock:
                while True:
                    try:
                        return await asyncio.shield(thread)
                    except asyncio.CancelledError as stop:
                        if thread.done() or clock.expired() or is_asked(stop) or not _go_on():
                            raise
        except (asyncio.CancelledError, TimeoutError):
            asked.set()
            call.cancel()  # now, so that it is not counted if it has not begun
            thread.cancel()
            if clock.expired():
                raise Overdue from None
            raise
        finally:
            waits = False

    async def wait(self, coroutine: Coroutine[Any, Any, T], *, within: float, margin: float) -> T:
        """Await it in an asyncio task of its own, which is cancelled after `within` seconds.

        Raises:
            Overdue: it has ended by that, or goes on after another `margin` seconds.
        """
        task = self._loop.create_task(coroutine)
        self.count(task)
        if await _waited(task, within, margin):
            return task.result()
        task.cancel()
        if not await _waited(task, margin, margin):
            raise Overdue
        try:
            return task.result()
        except asyncio.CancelledError as where:
            raise Overdue from where

    async def aside(self, work: Callable[[], T]) -> T:
        """Call it in another thread than that of the run, which may not have ended."""
        return await self._loop.run_in_executor(self._own, contextvars.copy_context().run, work)

    def close(self) -> None:
        """Start no more functions; running ones go on."""
        for pool in (self._pool, self._own):
            pool.shutdown(wait=False, cancel_futures=True)


async def _waited(task: "asyncio.Task[Any]", seconds: float, margin: float) -> bool:
    """Whether it has ended within this time. A request to stop goes on to it, for as long as it takes."""
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError as stop:
        task.cancel(*stop.args[:1])
        await asyncio.wait({task}, timeout=None if is_asked(stop) else margin)
        if task.done() and not task.cancelled():
            task.exception()  # nobody else asks for it
        raise
    return task.done()


def is_asked(stop: BaseException) -> bool:
    """Whether the supervisor has asked for this, and no code that cancels what it finds."""
    return stop.args[:1] in [(reason,) for reason in get_args(Reason)]


def _go_on() -> bool:
    task = asyncio.current_task()
    return task is not None and task.uncancel() >= 0


def _ignore(*_: Any, **__: Any) -> None:
    pass


async def _ignore_later(*_: Any, **__: Any) -> None:
    pass


class _Pool(ThreadPoolExecutor):
    """Threads for code of runs."""

    def __init__(self, name: str, count: int, threads: Threads, marks: Marks | None = None) -> None:
        super().__init__(count, thread_name_prefix=name)
        self._counts, self._marks = threads, marks

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        run = RUN.get()

        def body() -> T:
            try:
                if self._marks is not None and run is not None:
                    self._marks.in_thread(run)
                return fn(*args, **kwargs)
            except GeneratorExit as error:  # a coroutine that is given it would end without a word
                raise RuntimeError("The task raised GeneratorExit.") from error
            finally:
                end_copy()
                if self._marks is not None:
                    self._marks.out_of_thread()

        future = super().submit(body)
        self._counts.count(future)
        return future
