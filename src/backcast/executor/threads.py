"""Runs functions in threads that can be abandoned. Python can't stop a thread: an abandoned one goes on, and is counted
until it ends. Knows nothing of tasks.
"""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Overdue(Exception):
    """The function exceeded its time limit, and its thread has been abandoned."""


class Threads:
    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="task")
        self._lock = threading.Lock()
        self._busy: set[object] = set()
        self._abandoned: set[object] = set()

    @property
    def busy(self) -> int:
        """Threads that run a function now, abandoned ones included."""
        return len(self._busy)

    @property
    def abandoned(self) -> int:
        """Threads that still run a function after its caller has stopped waiting."""
        return len(self._abandoned)

    async def run(self, work: Callable[[], T], *, asked: threading.Event, within: float | None = None) -> T:
        """Call `work` in a thread, in a copy of this context. Sets `asked` when the caller stops waiting.

        Args:
            within: seconds, from the start of the function.

        Raises:
            Overdue: after `within` seconds.
            CancelledError: at once, even if the thread goes on.
        """
        loop, call, context = asyncio.get_running_loop(), object(), contextvars.copy_context()
        clock, waits = asyncio.timeout(None), True

        def start_clock() -> None:
            if waits and within is not None:
                clock.reschedule(loop.time() + within)

        def body() -> T:
            with self._lock:
                self._busy.add(call)
            try:
                if within is not None:
                    loop.call_soon_threadsafe(start_clock)
                return context.run(work)
            finally:
                with self._lock:
                    self._busy.discard(call)
                    self._abandoned.discard(call)

        try:
            async with clock:
                try:
                    return await loop.run_in_executor(self._pool, body)
                finally:
                    waits = False
        except (asyncio.CancelledError, TimeoutError):
            asked.set()
            with self._lock:
                self._abandoned |= self._busy & {call}
            if clock.expired():
                raise Overdue from None
            raise

    def close(self) -> None:
        """Start no more functions; running ones go on."""
        self._pool.shutdown(wait=False, cancel_futures=True)
