"""Ends what processes leave behind when they end: their children come to the nearest ancestor that adopts them."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

_ADOPT = 36
"""PR_SET_CHILD_SUBREAPER, of prctl(2)."""


def adopt() -> None:
    """Become the parent of whatever descendants of this process leave behind, also in a session of its own."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ADOPT, 1)


def end(known: Collection[int]) -> bool:
    """Kill and reap all children of this process but these; nothing where the system does not list them. Returns
    whether there was one: its own children come to this process when it has ended."""
    found = _children("self") - set(known)
    for pid in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # of another user, as by sudo
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return bool(found)


def lineage(pid: int) -> list[int]:
    """A process and its ancestors, as far as the system shows them; nothing for 0, a process outside of our view."""
    found = list[int]()
    while pid:
        found.append(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended
            break
    return found


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and those that these have; none where the system does not list them."""
    found, last = set[int](), {pid}
    while last:
        last = set[int]().union(*map(_children, last)) - found
        found |= last
    return found


def _children(pid: int | str) -> set[int]:
    found = set[int]()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found.update(map(int, file.read_text().split()))
    return found
