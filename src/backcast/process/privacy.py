"""Keeps what this process was given from the other processes of the same user: the code of tasks is one of them."""

import ctypes
import os
import sys
from pathlib import Path

_SET_DUMPABLE = 4


def hide() -> None:
    """Let nobody of the same user read this process's memory and environment in /proc. Linux only; elsewhere nothing.

    The kernel keeps others out of a process that may not be dumped, but not root, as who a container often runs. So the
    block of memory that /proc shows as the environment is emptied too, after its variables have got other places.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0)
    for name, value in dict(os.environ).items():
        os.environ[name] = value
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end, fields 50 and 51 in proc(5)
    if 0 < start < end:
        ctypes.memset(start, 0, end - start)
