"""The tasks of the chaos harness. Each value follows from the input alone and names its run's key. Each call is counted
in a file: so executions are known, and a task can fail a number of times, whatever process it runs in. Begin and end of
each are written to a file of the process.
"""

import asyncio
import contextlib
import ctypes
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import INPUTS, TASK_SOURCE

import backcast
from backcast.errors import FatalError, TransientError, UsageError

CALLS = Path("calls")
"""In the folder that the worker was started in: one file for each key, one byte for each call."""


SLOTS = Path("slots")
"""One file for each executor, `<pid of the worker>-<pid>`, with a line for each begin and end: seconds, +1 or -1."""


def _note(change: int) -> None:
    with (SLOTS / f"{os.getppid()}-{os.getpid()}").open("a") as file:
        file.write(f"{time.monotonic()} {change}\n")


@contextlib.contextmanager
def call(key: str) -> Iterator[int]:
    """Executes for a run; has the number of calls for its key."""
    _note(1)
    try:
        with (CALLS / key).open("a") as file:
            file.write(".")
            calls = file.tell()
        yield calls
    finally:
        _note(-1)


@task
async def add(key: str, a: int, b: int) -> Any:
    with call(key):
        return [key, a + b]


@task
def reverse(key: str, text: str) -> Any:
    with call(key):
        time.sleep(0.02)  # holds its thread
        return [key, text[::-1]]


@task
async def doze(key: str, seconds: float) -> Any:
    with call(key):
        await asyncio.sleep(seconds)
        return [key, seconds]


@task(retries=5, retry_delay_seconds=0.3, retry_jitter_factor=0.5)
async def stumble(key: str, fails: int) -> Any:
    with call(key) as calls:
        if calls <= fails:
            raise TransientError(f"call {calls} of {key}")
        return [key, fails]


@task(retries=2, retry_delay_seconds=0.1)
async def refuse(key: str, kind: str) -> None:
    with call(key):
        raise {"usage": UsageError, "fatal": FatalError, "plain": ValueError}[kind](f"{key}, as asked")


@task(cache_policy=INPUTS + TASK_SOURCE)
async def square(key: str, number: int) -> Any:
    with call(key):
        await asyncio.sleep(0.1)
        return [key, number * number]


@task
async def measure(key: str, text: str) -> Any:
    """Takes a large input."""
    with call(key):
        return [key, len(text), hashlib.sha256(text.encode()).hexdigest()]


@task
async def enlarge(key: str, word: str, times: int) -> Any:
    """Returns a large result."""
    with call(key):
        return [key, word * times]


@task
async def offend(key: str, kind: str) -> Any:
    """Its first call blocks, crashes or ends its process."""
    with call(key) as calls:
        if calls == 1:
            match kind:
                case "block":
                    while True:
                        pass
                case "crash":
                    ctypes.string_at(0)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case _:
                    os._exit(1)
        return [key, kind]


@task(retries=3, retry_delay_seconds=0.2)
async def chant(key: str, fails: int, words: int) -> Any:
    """Emits numbers; some of its calls fail half-way."""
    with call(key) as calls:
        for word in range(words):
            backcast.emit(word)
            backcast.progress(word / words)
            await asyncio.sleep(0.1)
            if calls <= fails and word >= words // 2:
                raise TransientError(f"call {calls} of {key}")
        return [key, words]


@task(timeout_seconds=0.5)
async def dawdle(key: str) -> None:
    with call(key):
        await asyncio.sleep(60)
