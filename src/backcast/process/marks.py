"""A page of memory that an executor shares with its supervisor: which run its loop, and each of its threads, executes
now, and how often a run was retried. A write costs no system call, and the page can be read when the executor hangs or
is dead.
"""

import mmap
import struct
import threading
from collections import deque
from dataclasses import dataclass
from uuid import UUID

_ENTRY = struct.Struct("<QQ16s")
"""A thread's identity in Python's dumps, its number in the kernel, and the run."""
_IDS, _RUN = struct.Struct("<QQ"), slice(16, 32)
_COUNT = struct.Struct("<16sQ")
"""A run, and its retries so far."""
_NONE = bytes(16)


@dataclass(frozen=True, slots=True)
class Mark:
    ident: int
    """As `threading.get_ident`, and as faulthandler shows it."""
    native: int
    """As in /proc/<pid>/task."""
    run: UUID | None


def size(threads: int) -> int:
    """Bytes for the loop, so many threads, and the counts of as many runs."""
    return _counts(threads) + _COUNT.size * threads


def _counts(threads: int) -> int:
    return _ENTRY.size * (threads + 1)


class Marks:
    """Entry 0 belongs to the loop's thread, which makes this; each other thread takes one of its own."""

    def __init__(self, fd: int, threads: int) -> None:
        self._map = mmap.mmap(fd, size(threads))
        self._left = iter(range(1, threads + 1))
        self._lock = threading.Lock()
        self._mine = threading.local()
        self._unused = deque(range(_counts(threads), size(threads), _COUNT.size))
        self._counted = dict[bytes, int]()
        _IDS.pack_into(self._map, 0, threading.get_ident(), threading.get_native_id())

    def in_loop(self, run: bytes) -> None:
        """The loop begins a step of this run."""
        self._map[_RUN] = run

    def out_of_loop(self) -> None:
        self._map[_RUN] = _NONE

    def in_thread(self, run: bytes) -> None:
        """This thread begins the function of this run, or ends it if there is none."""
        at = getattr(self._mine, "at", None)
        if at is None:
            with self._lock:
                at = self._mine.at = next(self._left, 0) * _ENTRY.size
            if at:
                _IDS.pack_into(self._map, at, threading.get_ident(), threading.get_native_id())
        if at:
            self._map[at + 16 : at + 32] = run

    def out_of_thread(self) -> None:
        self.in_thread(_NONE)

    def retried(self, run: bytes, retries: int) -> None:
        """The next execution of this run begins: it counts, whatever becomes of the process."""
        at = self._counted.get(run)
        if at is None:
            at = self._counted[run] = self._unused.popleft()
        _COUNT.pack_into(self._map, at, run, retries)

    def ended(self, run: bytes) -> None:
        """The attempt is over. What is counted stays until its place is needed: the report may still be on its way."""
        if (at := self._counted.pop(run, None)) is not None:
            self._unused.append(at)


def read(fd: int, threads: int) -> list[Mark]:
    """The marks, the loop's own first."""
    entries = _ENTRY.iter_unpack(_page(fd, threads)[: _counts(threads)])
    return [Mark(ident, native, None if run == _NONE else UUID(bytes=run)) for ident, native, run in entries if ident]


def retries(fd: int, threads: int) -> dict[UUID, int]:
    """How often each run was retried, of those that were."""
    entries = _COUNT.iter_unpack(_page(fd, threads)[_counts(threads) :])
    return {UUID(bytes=run): count for run, count in entries if count}


def _page(fd: int, threads: int) -> bytes:
    """The page; empty if code of a run has cut it off."""
    try:
        with mmap.mmap(fd, size(threads), access=mmap.ACCESS_READ) as page:
            return page[:]
    except ValueError:
        return b""
