"""Runs functions in threads that can be abandoned. Python can't stop a thread: an abandoned one goes on, and is counted
until it ends. Knows nothing of tasks.
"""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from backcast.executor.tracking import RUN, end_copy
from backcast.process.marks import Marks

T = TypeVar("T")


class Overdue(Exception):
    """The function exceeded its time limit, and its thread has been abandoned."""


class Threads:
    def __init__(self, count: int, marks: Marks | None = None, freed: Callable[[bytes], object] | None = None) -> None:
        """`freed` is called on the loop when the last abandoned thread of a run ends."""
        self._marks, self._freed = marks, freed
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="task")
        self._lock = threading.Lock()
        self._busy: set[object] = set()
        self._abandoned = dict[object, bytes | None]()

    def has_left(self, run: bytes) -> bool:
        """Whether a thread still runs a function of this run after its caller has stopped waiting."""
        with self._lock:
            return run in self._abandoned.values()

    async def run(self, work: Callable[[], T], *, asked: threading.Event, within: float | None = None) -> T:
        """Call `work` in a thread, in a copy of this context. Sets `asked` when the caller stops waiting.

        Args:
            within: seconds, from the start of the function.

        Raises:
            Overdue: after `within` seconds.
            CancelledError: at once, even if the thread goes on.
        """
        loop, call, context = asyncio.get_running_loop(), object(), contextvars.copy_context()
        clock, waits, run = asyncio.timeout(None), True, RUN.get()

        def start_clock() -> None:
            if waits and within is not None:
                clock.reschedule(loop.time() + within)

        def body() -> T:
            with self._lock:
                self._busy.add(call)
            try:
                if within is not None:
                    loop.call_soon_threadsafe(start_clock)
                if self._marks is not None and run is not None:
                    self._marks.in_thread(run)
                return context.run(work)
            except GeneratorExit as error:  # a coroutine that is given it would end without a word
                raise RuntimeError("The task raised GeneratorExit.") from error
            finally:
                end_copy()
                if self._marks is not None:
                    self._marks.out_of_thread()
                with self._lock:
                    self._busy.discard(call)
                    was_left = call in self._abandoned
                    self._abandoned.pop(call, None)
                    is_last = was_left and run not in self._abandoned.values()
                if is_last and self._freed is not None and run is not None:
                    with contextlib.suppress(RuntimeError):  # the loop is closed
                        loop.call_soon_threadsafe(self._freed, run)

        try:
            async with clock:
                try:
                    return await loop.run_in_executor(self._pool, body)
                finally:
                    waits = False
        except (asyncio.CancelledError, TimeoutError):
            asked.set()
            with self._lock:
                if call in self._busy:
                    self._abandoned[call] = run
            if clock.expired():
                raise Overdue from None
            raise

    def close(self) -> None:
        """Start no more functions; running ones go on."""
        self._pool.shutdown(wait=False, cancel_futures=True)
