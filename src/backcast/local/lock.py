"""A lock file: one process holds it, and the kernel frees it when that process ends, however it ends."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL = 0.25
"""Seconds between two tries to take a lock that is held."""


@contextmanager
def held(path: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock while entered. While another process holds it, `waiting` is called several times a second.

    Raises:
        BlockingIOError: another process holds it, and there is no `waiting`.
    """
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waiting is None:
                    raise
                waiting()
                time.sleep(_POLL)
        yield
