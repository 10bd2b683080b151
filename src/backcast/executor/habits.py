"""Keeps what every run of this process relies on, and what any of them can change for all: the current folder, the
streams, limits, time-outs. Decides when a change is put back: when the next run ends or, if a run may need it and the
others can bear it, once each run that may have made it is over. A process in which something is lost for good has to be
replaced.
"""

import _signal  # pyright: ignore[reportMissingImports]  # has no stubs
import asyncio
import contextlib
import fcntl
import gc
import locale
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

SLOW_EVERY = 0.05
"""Seconds between two looks at what is slow to read, while runs go on."""
IDLE_EVERY = 0.002
"""Seconds between two such looks when none does: runs that take no time need not pay for one each."""
_LIMITS = ("RLIMIT_NOFILE", "RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NPROC")
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_HANDLED_IN_C = {signal.SIGCHLD, signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}
"""By libuv, which waits for child processes, and by faulthandler: Python can't put these handlers back."""
_getsignal: Callable[[int], Any] = _signal.getsignal
"""That of `signal` makes an enum of each answer, for twenty times the cost."""


def _never(_: Any) -> bool:
    return False


def _always(_: Any) -> bool:
    return True


def _is_open(stream: Any) -> bool:
    return stream is not None and not getattr(stream, "closed", False)


@dataclass(slots=True)
class _Habit:
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    is_quick: bool = False
    """It can be read in a tenth of a microsecond: the others cost more than a run does, if there are many."""
    bears: Callable[[Any], bool] = _never
    """Whether others go on with this value, which a run may need to its end: it is not known which one has set it."""
    is_lasting: bool = False
    """What is put back is not all that was lost."""
    kept: Any = None

    def is_changed(self) -> bool:
        try:
            return bool(self.read() != self.kept)
        except Exception:  # noqa: BLE001  # the folder is gone, the stream was deleted, a list is none any more
            return True

    def is_borne(self) -> bool:
        try:
            return self.bears(self.read())
        except Exception:  # noqa: BLE001
            return False

    def put_back(self) -> None:
        with contextlib.suppress(Exception):  # it is looked at again
            self.write(self.kept)


class Habits:
    """Belongs to the main thread, and to its loop."""

    def __init__(self) -> None:
        """What holds now is kept."""
        self._habits = _habits()
        for habit in self._habits:
            habit.kept = habit.read()
        self._quick = [habit for habit in self._habits if habit.is_quick]
        self._quick_reads, self._quick_kept = [each.read for each in self._quick], [each.kept for each in self._quick]
        self._looked_at = 0.0
        self._changers = dict[str, set[bytes]]()
        """By the name of a habit that is changed: those that go on of the runs that may have changed it."""
        self.worn = ""
        """What can't be put back, or ""."""

    def ended(self, running: Collection[bytes]) -> None:
        """A run has ended; these go on. What is slow to read is looked at when none does, and now and then."""
        looked_at, now = self._quick, time.monotonic()
        if now >= self._looked_at + (SLOW_EVERY if running else IDLE_EVERY):
            looked_at, self._looked_at = self._habits, now
        elif not self._changers and self._is_as_kept():
            return
        for habit in looked_at:
            if not habit.is_changed():
                self._changers.pop(habit.name, None)
                continue
            left = self._changers[habit.name] = self._changers.get(habit.name, set(running)) & set(running)
            if not left or not habit.is_borne():
                habit.put_back()
                del self._changers[habit.name]
                if habit.is_lasting or habit.is_changed():
                    self.worn = f"a run has changed {habit.name} for good"

    def _is_as_kept(self) -> bool:
        """Whether all that is quick to read is."""
        try:
            return [read() for read in self._quick_reads] == self._quick_kept
        except Exception:  # noqa: BLE001  # it shows which one
            return False


def _habits() -> list[_Habit]:
    variables = dict(os.environ)
    filters = list(warnings.filters)
    errors = [each for each in filters if each[0] == "error"]
    handlers = list(logging.root.handlers)
    recursion = sys.getrecursionlimit()

    def set_logging(kept: Any) -> None:
        level, disabled, factory, _, of_handlers = kept
        logging.setLogRecordFactory(factory)
        logging.root.handlers = list(handlers)
        logging.root.setLevel(level)
        logging.disable(disabled)
        for handler, own in zip(handlers, of_handlers, strict=True):
            handler.filters = list(own)

    def read_logging() -> Any:
        root, of_handlers = logging.root, [list(each.filters) for each in handlers]
        return root.level, root.manager.disable, logging.getLogRecordFactory(), list(root.handlers), of_handlers

    def added_errors() -> list[Any]:
        return [each for each in warnings.filters if each[0] == "error" and each not in errors]

    def remove_errors(_: Any) -> None:
        if not isinstance(warnings.filters, list):
            warnings.filters = list(filters)
        for each in added_errors():
            warnings.filters.remove(each)  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            pass  # its end makes Python look at the filters again

    def read_timers() -> list[bool]:
        return [signal.getitimer(timer)[0] > 0 for timer in _TIMERS]

    def clear_timers(_: Any) -> None:  # none is set when the process starts
        for timer in _TIMERS:
            signal.setitimer(timer, 0)

    def handling(name: str, numbers: set[signal.Signals], *, is_lasting: bool = False) -> _Habit:
        given = [int(number) for number in numbers]

        def read() -> list[Any]:
            return list(map(_getsignal, given))

        def write(kept: list[Any]) -> None:
            for number, handler in zip(given, kept, strict=True):
                if _getsignal(number) != handler:
                    signal.signal(number, handler)

        return _Habit(name, read, write, is_lasting=is_lasting)

    def add_variables(_: Any) -> None:
        for name, value in variables.items():
            os.environ.setdefault(name, value)

    def read_paths() -> list[str]:
        return [each for each in path if each in (sys.path or ())]

    def add_paths(kept: list[str]) -> None:
        sys.path = [*kept, *(each for each in sys.path or () if each not in kept)]

    spares = {number: fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3) for number in range(3) if _is_file(number)}

    def read_descriptors() -> list[tuple[Any, ...]]:
        return list(map(_file, spares))

    def open_descriptors(kept: list[tuple[Any, ...]]) -> None:
        """Those that are closed. Where another file has taken their place, a run may need it."""
        for (number, spare), was in zip(spares.items(), kept, strict=True):
            if _file(spare) == was and (got := fcntl.fcntl(spare, fcntl.F_DUPFD, number)) != number:
                os.close(got)

    loop, path = asyncio.get_running_loop(), list(sys.path)
    quick = partial(_Habit, is_quick=True)
    borne = partial(_Habit, bears=_always)
    return [
        quick(
            "the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit, bears=lambda limit: limit > recursion
        ),
        quick("sys.stdout", lambda: sys.stdout, partial(setattr, sys, "stdout"), bears=_is_open),
        quick("sys.stderr", lambda: sys.stderr, partial(setattr, sys, "stderr"), bears=_is_open),
        quick("garbage collection", gc.isenabled, lambda kept: gc.enable() if kept else gc.disable(), bears=_always),
        quick("the time-out of sockets", socket.getdefaulttimeout, socket.setdefaulttimeout),
        quick("the switch interval", sys.getswitchinterval, sys.setswitchinterval),
        quick("threading.excepthook", lambda: threading.excepthook, partial(setattr, threading, "excepthook")),
        quick("sys.excepthook", lambda: sys.excepthook, partial(setattr, sys, "excepthook")),
        quick("the task factory", loop.get_task_factory, loop.set_task_factory),
        quick("the loop's exception handler", loop.get_exception_handler, loop.set_exception_handler),
        borne("the loop's debug mode", loop.get_debug, loop.set_debug),
        borne("the trace function", sys.gettrace, sys.settrace),
        borne("the profile function", sys.getprofile, sys.setprofile),
        _Habit("the trace function of threads", threading.gettrace, threading.settrace),
        _Habit("the profile function of threads", threading.getprofile, threading.setprofile),
        _Habit("the stack size of threads", threading.stack_size, threading.stack_size),
        _Habit(
            "blocked signals",
            partial(signal.pthread_sigmask, signal.SIG_BLOCK, ()),
            partial(signal.pthread_sigmask, signal.SIG_SETMASK),
        ),
        _Habit("logging", read_logging, set_logging),
        _Habit("the alarm clock", read_timers, clear_timers),
        handling("the handlers of signals", signal.valid_signals() - _HANDLED_IN_C),
        handling("the handlers of signals that C code handles", _HANDLED_IN_C, is_lasting=True),
        borne("the descriptors of the standard streams", read_descriptors, open_descriptors),
        _Habit("warnings", added_errors, remove_errors),
        _Habit("the locale", partial(locale.setlocale, locale.LC_ALL), partial(locale.setlocale, locale.LC_ALL)),
        borne("the current folder", os.getcwd, os.chdir),
        borne("the import path", read_paths, add_paths),
        borne("the environment", lambda: len(os.environ) < len(variables), add_variables),
        *(
            _Habit(name, partial(resource.getrlimit, number), partial(resource.setrlimit, number))
            for name in _LIMITS
            for number in [getattr(resource, name)]
        ),
    ]


def _file(number: int) -> tuple[Any, ...]:
    return os.fstat(number)[1:3]  # its inode and device


def _is_file(number: int) -> bool:
    try:
        return bool(_file(number))
    except OSError:
        return False
