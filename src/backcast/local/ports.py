"""The ports of `backcast up`: takes free ones for as long as it runs, and finds out who listens on them."""

import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import Set
from pathlib import Path

from backcast.errors import ConfigurationError
from backcast.local import lock


class Ports:
    """Ports of loopback that this process has taken. The processes that will listen on them bind them later, so a lock
    file per port keeps another `backcast up` of this user from taking the same ones meanwhile."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._locks = Path(tempfile.gettempdir()) / f"backcast-ports-{os.getuid()}"
        self._locks.mkdir(mode=0o700, exist_ok=True)
        there = self._locks.lstat()
        if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid():  # anyone can make folders in /tmp
            raise ConfigurationError(f"{self._locks} belongs to someone else: remove it.")

    def take(self, wanted: int, others: Set[int] = frozenset()) -> int:
        """`wanted`, or the next free port that is not in `others`; for 0, any free port."""
        for port in sorted(set(range(wanted, min(wanted + 100, 1 << 16))) - others):
            with contextlib.ExitStack() as attempt, contextlib.suppress(OSError):
                free = _bind(port)
                attempt.enter_context(lock.held(self._locks / str(free)))  # BlockingIOError is an OSError
                self._held.push(attempt.pop_all())
                return free
        raise ConfigurationError(f"Port {wanted} and the hundred above it are taken: name another one.")

    def release(self) -> None:
        self._held.close()


def is_free(port: int) -> bool:
    try:
        _bind(port)
    except OSError:
        return False
    return True


def _bind(port: int) -> int:
    """Bind the port for a moment, and return its number."""
    with socket.socket() as probe:
        # As servers do: the port may have been used a moment before.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return int(probe.getsockname()[1])


def listens(pid: int, port: int) -> bool:
    """Whether this process, or a descendant of it, listens on the port. True if the system does not let us know."""
    import psutil

    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return any(
            each.status == psutil.CONN_LISTEN and each.laddr.port == port
            for member in family
            for each in member.net_connections(kind="tcp")
        )
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
