"""Decides whose doing the end of an executor was: from the marks that it left, from the dump of its threads, and from
what each of them did while the loop was silent.
"""

import contextlib
import re
import signal
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import UUID

from backcast.process.marks import Mark

Fault = Literal["own", "other", "unknown"]
"""Whose doing the end of an executor was, for a run that it had."""
TRACEBACK = 4000
"""Characters of a dump that go to the error of a run."""
_THREAD = re.compile(r"^(Current thread|Thread) 0x([0-9a-f]+)", re.MULTILINE)
_GARBAGE = re.compile(r"^  Garbage-collecting$| in __del__$", re.MULTILINE)


_WAKES = 50
"""A second: Python's threads look for the interpreter's lock 200 times a second while another one keeps it."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What the threads of an executor did so far, or in a while. Empty where the system does not show it."""

    at: float = 0.0
    """Seconds."""
    spent: Mapping[int, float] = field(default_factory=dict[int, float])
    """Seconds of CPU by thread, by its number in the kernel."""
    wakes: int = 0
    """How often the loop's thread has gone to sleep."""
    waits: bool = False
    """Whether the loop's thread waits for a lock."""

    def since(self, before: "Activity") -> "Activity":
        spent = {native: seconds - before.spent.get(native, 0.0) for native, seconds in self.spent.items()}
        return Activity(self.at - before.at, spent, self.wakes - before.wakes, self.waits)


@dataclass(frozen=True, slots=True)
class Evidence:
    marks: list[Mark]
    """The loop's own first."""
    dump: str = ""
    """Of faulthandler: the stack of every thread."""
    silence: "Activity | None" = None
    """What its threads did while the loop did not answer; None when the executor ended by itself."""
    is_only: bool = False
    """The executor never had another run, which may have left code, a timer or memory behind."""


def faults(runs: Collection[UUID], evidence: Evidence) -> dict[UUID, Fault]:
    """One for each of the runs that the executor had."""
    runs = set(runs)
    if evidence.is_only:
        return dict.fromkeys(runs, "own")
    culprits = _culprits(evidence) & runs if evidence.marks else set[UUID]()
    if not culprits:
        return dict.fromkeys(runs, "unknown")
    fault: Fault = "own" if len(culprits) == 1 else "unknown"
    return {run: fault if run in culprits else "other" for run in runs}


def _culprits(evidence: Evidence) -> set[UUID]:
    """The runs among which the culprit is; empty when nothing is known."""
    loop, *threads = evidence.marks
    if evidence.silence is not None:
        is_garbage = _GARBAGE.search(_stack_of(evidence.dump, loop)) is not None  # of any run before
        return set() if is_garbage else _of(*_blocking(loop, threads, evidence.silence))
    # The process writes a dump when it crashes, and when it calls `os._exit`. Without one, as when the kernel ends it,
    # the code that was executing need not be the reason.
    for found in _THREAD.finditer(evidence.dump):
        if found[1] == "Current thread":
            return _of(*(mark for mark in evidence.marks if mark.ident == int(found[2], 16)))
    return set()


def _of(*marks: Mark) -> set[UUID]:
    return {mark.run for mark in marks if mark.run is not None}


def _blocking(loop: Mark, threads: list[Mark], silence: Activity) -> list[Mark]:
    """Those among which the thread is that keeps the loop from going on.

    It is the loop's own if that computes, or sleeps without waiting for a lock, which any code may have. If it wakes
    again and again without computing, it waits for the interpreter's lock, which another thread keeps: one that
    computes, if there is one. But code that sleeps in small steps looks the same.
    """
    busiest = max(silence.spent, key=lambda native: silence.spent[native], default=loop.native)
    computes = silence.spent.get(loop.native, 0.0) > max(0.05 * silence.at, 0.1)
    if computes or silence.wakes <= _WAKES * silence.at:
        return [loop] if computes or not silence.waits else []  # whoever has the lock
    is_busy = silence.spent[busiest] > max(0.5 * sum(silence.spent.values()), 0.2)
    if busiest == loop.native or not is_busy:
        return [loop, *threads]
    keeping = [mark for mark in threads if mark.native == busiest]
    return [loop, *keeping] if keeping else []  # a thread that some run has started


def stack(dump: str, marks: list[Mark], run: UUID | None) -> str:
    """The part of a dump that shows the thread of this run, or all of it; bounded."""
    own = (_stack_of(dump, mark) for mark in reversed(marks) if mark.run == run is not None)  # its thread first
    return (next(filter(None, own), "") or dump.strip())[:TRACEBACK]


def _stack_of(dump: str, thread: Mark) -> str:
    starts = [*_THREAD.finditer(dump)]
    for number, found in enumerate(starts):
        if int(found[2], 16) == thread.ident:
            end = starts[number + 1].start() if number + 1 < len(starts) else len(dump)
            return dump[found.start() : end].strip()
    return ""


def activity(pid: int) -> Activity:
    """Of a process until now."""
    seconds, wakes, waits = dict[int, float](), 0, False
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has ended
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / 100
            if int(folder.name) == pid:  # the loop is in the main thread
                status = (folder / "status").read_text(errors="replace")
                wakes = int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
                waits = (folder / "wchan").read_text().startswith("futex")
    return Activity(time.monotonic(), seconds, wakes, waits)


def can_dump(pid: int) -> bool:
    """Whether a process takes SIGABRT, and so writes its dump: not one that is stopped, or ignores it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        ignored = int(status.partition("\nSigIgn:")[2].split()[0], 16)
    except (OSError, IndexError):
        return True
    is_stopped = status.partition("\nState:")[2].split()[0] in ("T", "t")
    return not is_stopped and not ignored >> (signal.SIGABRT - 1) & 1
