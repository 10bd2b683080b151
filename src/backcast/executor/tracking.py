"""Knows which run the code belongs to that executes now, and marks it for the supervisor: see `process.marks`.

Every asyncio task that a run starts is marked with it, step by step; a callback that it leaves on the loop is not.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar
from typing import Any

from backcast.process.marks import Marks
from backcast.reporting import REPORTER

RUN: ContextVar[bytes | None] = ContextVar("backcast_run", default=None)
"""The id of the run that this code belongs to."""


_NOBODY = bytes(16)
_copies = list[int]()


def end_copy() -> None:
    """End this process if it is a fork of the executor: called where the code of a run returns. A copy that went on
    would execute every run of the executor once more, and report to its supervisor."""
    if _copies:
        os._exit(0)


def guard(channel_fd: int) -> None:
    """Let no fork of this process, which began in whatever code, do a step of its loop, or reach its supervisor."""

    def in_copy() -> None:
        _copies.append(os.getpid())
        REPORTER.set(None)  # in vain, and another thread may have kept the lock of the reports
        _Marked.send = _Marked.throw = _end  # pyright: ignore[reportAttributeAccessIssue]  # the rest of this step goes on
        with contextlib.suppress(OSError):  # user code has closed it, or has left no descriptor
            os.close(channel_fd)
            null = os.open(os.devnull, os.O_RDWR)  # reading it is the end of the channel
            if null != channel_fd:
                os.dup2(null, channel_fd, inheritable=False)
                os.close(null)

    os.register_at_fork(after_in_child=in_copy)


def _end(*_: Any) -> Any:
    os._exit(0)


class _Marked(Coroutine[Any, Any, Any]):
    """A coroutine whose steps are marked."""

    __slots__ = ("_begin", "_coroutine", "_end", "_run")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], run: bytes, marks: Marks) -> None:
        self._coroutine, self._run, self._begin, self._end = coroutine, run, marks.in_loop, marks.out_of_loop

    def send(self, value: Any) -> Any:
        self._begin(self._run)
        try:
            return self._coroutine.send(value)
        finally:
            end_copy()
            self._end()

    def throw(self, *error: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._begin(self._run)
        try:
            return self._coroutine.throw(*error)
        finally:
            end_copy()
            self._end()

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:  # libraries ask for cr_frame, cr_running and the like
        return getattr(self._coroutine, name)


TaskFactory = Callable[..., "asyncio.Task[Any]"]


def task_factory(marks: Marks) -> TaskFactory:
    def make(
        loop: asyncio.AbstractEventLoop, coroutine: Any, *, context: Context | None = None, **others: Any
    ) -> "asyncio.Task[Any]":
        run = RUN.get() if context is None else context.get(RUN)
        if asyncio.iscoroutine(coroutine):
            coroutine = _Marked(coroutine, run or _NOBODY, marks)
        return asyncio.Task(coroutine, loop=loop, context=context, **others)

    return make
