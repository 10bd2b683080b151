"""Decides whose doing the end of an executor was: from the marks that it left, from the dump of its threads, and from
the time that each of them spent.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import UUID

from backcast.process.marks import Mark

Fault = Literal["own", "other", "unknown"]
"""Whose doing the end of an executor was, for a run that it had."""
TRACEBACK = 4000
"""Characters of a dump that go to the error of a run."""
_THREAD = re.compile(r"^(Current thread|Thread) 0x([0-9a-f]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Evidence:
    marks: list[Mark]
    """The loop's own first."""
    dump: str = ""
    """Of faulthandler: the stack of every thread."""
    spent: Mapping[int, float] | None = None
    """Seconds of CPU that each thread (by its number in the kernel) spent while the loop did not answer; None when the
    executor ended by itself."""
    is_exit: bool = False
    """It has ended by a call of `exit`, and by no signal."""


def faults(runs: Collection[UUID], evidence: Evidence) -> dict[UUID, Fault]:
    """One for each of the runs that the executor had."""
    runs = set(runs)
    if len(runs) == 1:
        return dict.fromkeys(runs, "own")
    culprits = _culprits(evidence) & runs if evidence.marks else set[UUID]()
    if not culprits:
        return dict.fromkeys(runs, "unknown")
    fault: Fault = "own" if len(culprits) == 1 else "unknown"
    return {run: fault if run in culprits else "other" for run in runs}


def _culprits(evidence: Evidence) -> set[UUID]:
    """The runs among which the culprit is; empty when nothing is known."""
    loop, *threads = evidence.marks
    if evidence.spent is not None:
        return _of(_blocking(loop, threads, evidence.spent))
    for found in _THREAD.finditer(evidence.dump):
        if found[1] == "Current thread":
            return _of(next((mark for mark in evidence.marks if mark.ident == int(found[2], 16)), None))
    # The caller of exit is still marked. A thread that sleeps is marked too, so that only the loop's own mark is clear;
    # and a signal, such as the kernel's when memory is short, need not come from the code that was executing.
    is_clear = evidence.is_exit and not any(mark.run for mark in threads)
    return _of(loop) if is_clear else set()


def _of(mark: Mark | None) -> set[UUID]:
    return set() if mark is None or mark.run is None else {mark.run}


def _blocking(loop: Mark, threads: list[Mark], spent: Mapping[int, float]) -> Mark | None:
    """The thread that keeps the loop from going on: the one that computes, or else the loop's own, which sleeps."""
    busiest = max(spent, key=lambda native: spent[native], default=loop.native)
    if spent.get(busiest, 0.0) < 0.5 * max(sum(spent.values()), 0.01) or spent.get(busiest, 0.0) < 0.2:
        return loop
    return next((mark for mark in (loop, *threads) if mark.native == busiest), None)


def stack(dump: str, marks: list[Mark], run: UUID) -> str:
    """The part of a dump that shows the thread of this run, or all of it; bounded."""
    idents = {mark.ident for mark in marks if mark.run == run}
    starts = [*_THREAD.finditer(dump)]
    for number, found in enumerate(starts):
        if int(found[2], 16) in idents:
            end = starts[number + 1].start() if number + 1 < len(starts) else len(dump)
            return dump[found.start() : end].strip()[:TRACEBACK]
    return dump.strip()[:TRACEBACK]


def spent_by(pid: int) -> dict[int, float]:
    """Seconds of CPU that each thread of a process has spent; empty where the system does not show them."""
    seconds = dict[int, float]()
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / 100
    return seconds
