"""Keeps what every run of this process relies on, and what any of them can change for all: the current folder, the
streams, limits, time-outs. Decides when a change is put back: when the next run ends or, if a run may need it and the
others can bear it, once each run that may have made it is over. A process in which one can't be put back has to be
replaced.
"""

import asyncio
import contextlib
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
_LIMITS = ("RLIMIT_NOFILE", "RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NPROC")


@dataclass(slots=True)
class _Habit:
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    is_quick: bool = False
    """It can be read in a tenth of a microsecond: the others cost more than a run does, if there are many."""
    is_borne: bool = False
    """Others go on with the change, which a run may need to its end: it is not known which one has made it."""
    kept: Any = None

    def is_changed(self) -> bool:
        try:
            return bool(self.read() != self.kept)
        except OSError:  # the folder is gone
            return True

    def put_back(self) -> None:
        with contextlib.suppress(OSError, ValueError):
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
        self._due = 0.0
        self._changers = dict[str, set[bytes]]()
        """By the name of a habit that is changed: those that go on of the runs that may have changed it."""
        self.worn = ""
        """What can't be put back, or ""."""

    def ended(self, running: Collection[bytes]) -> None:
        """A run has ended; these go on. What is slow to read is looked at when none does, and now and then."""
        looked_at, now = self._quick, time.monotonic()
        if not running or now >= self._due:
            looked_at, self._due = self._habits, now + SLOW_EVERY
        elif not self._changers and [read() for read in self._quick_reads] == self._quick_kept:
            return
        for habit in looked_at:
            if not habit.is_changed():
                self._changers.pop(habit.name, None)
                continue
            left = self._changers[habit.name] = self._changers.get(habit.name, set(running)) & set(running)
            if not left or not habit.is_borne:
                habit.put_back()
                if habit.is_changed():
                    self.worn = f"a run has changed {habit.name} for good"


def _habits() -> list[_Habit]:
    variables = dict(os.environ)
    errors = [each for each in warnings.filters if each[0] == "error"]
    handlers = list(logging.root.handlers)

    def set_logging(kept: Any) -> None:
        level, disabled, filters = kept
        logging.root.setLevel(level)
        logging.disable(disabled)
        for handler, own in filters:
            handler.filters[:] = own
            if handler not in logging.root.handlers:
                logging.root.addHandler(handler)

    def read_logging() -> Any:
        there = [(each, list(each.filters)) for each in handlers if each in logging.root.handlers]
        return logging.root.level, logging.root.manager.disable, there

    def added_errors() -> list[Any]:
        return [each for each in warnings.filters if each[0] == "error" and each not in errors]

    def remove_errors(_: Any) -> None:
        for each in added_errors():
            warnings.filters.remove(each)  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            pass  # its end makes Python look at the filters again

    def read_alarm() -> Any:
        return signal.getitimer(signal.ITIMER_REAL)[0] > 0, signal.getsignal(signal.SIGALRM)

    def set_alarm(kept: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)  # none is set when the process starts
        signal.signal(signal.SIGALRM, kept[1])

    def add_variables(_: Any) -> None:
        for name, value in variables.items():
            os.environ.setdefault(name, value)

    def read_paths() -> list[str]:
        return [each for each in path if each in (sys.path or ())]

    def add_paths(kept: list[str]) -> None:
        sys.path = [*kept, *(each for each in sys.path or () if each not in kept)]

    loop, path = asyncio.get_running_loop(), list(sys.path)
    quick = partial(_Habit, is_quick=True)
    borne = partial(quick, is_borne=True)
    return [
        borne("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
        borne("sys.stdout", lambda: sys.stdout, partial(setattr, sys, "stdout")),
        borne("sys.stderr", lambda: sys.stderr, partial(setattr, sys, "stderr")),
        borne("garbage collection", gc.isenabled, lambda kept: gc.enable() if kept else gc.disable()),
        quick("the time-out of sockets", socket.getdefaulttimeout, socket.setdefaulttimeout),
        quick("the switch interval", sys.getswitchinterval, sys.setswitchinterval),
        quick("threading.excepthook", lambda: threading.excepthook, partial(setattr, threading, "excepthook")),
        quick("sys.excepthook", lambda: sys.excepthook, partial(setattr, sys, "excepthook")),
        quick("the task factory", loop.get_task_factory, loop.set_task_factory),
        quick("the loop's exception handler", loop.get_exception_handler, loop.set_exception_handler),
        _Habit("the loop's debug mode", loop.get_debug, loop.set_debug, is_borne=True),
        _Habit("the trace function", sys.gettrace, sys.settrace, is_borne=True),
        _Habit("the profile function", sys.getprofile, sys.setprofile, is_borne=True),
        _Habit("the trace function of threads", threading.gettrace, threading.settrace, is_borne=True),
        _Habit("the profile function of threads", threading.getprofile, threading.setprofile, is_borne=True),
        _Habit("the stack size of threads", threading.stack_size, threading.stack_size),
        _Habit(
            "blocked signals",
            partial(signal.pthread_sigmask, signal.SIG_BLOCK, ()),
            partial(signal.pthread_sigmask, signal.SIG_SETMASK),
        ),
        _Habit("logging", read_logging, set_logging),
        _Habit("the alarm clock", read_alarm, set_alarm),
        _Habit("warnings", added_errors, remove_errors),
        _Habit("the locale", partial(locale.setlocale, locale.LC_ALL), partial(locale.setlocale, locale.LC_ALL)),
        _Habit("the current folder", os.getcwd, os.chdir, is_borne=True),
        _Habit("the import path", read_paths, add_paths, is_borne=True),
        _Habit("the environment", lambda: len(os.environ) < len(variables), add_variables, is_borne=True),
        *(
            _Habit(name, partial(resource.getrlimit, number), partial(resource.setrlimit, number))
            for name in _LIMITS
            for number in [getattr(resource, name)]
        ),
    ]
