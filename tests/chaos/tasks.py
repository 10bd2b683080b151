"""The tasks of the chaos harness. Each value follows from the input alone and names its run's key. Each call is counted
in a file: so executions are known, and a task can fail a number of times, whatever process it runs in.
"""

import asyncio
import ctypes
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import INPUTS, TASK_SOURCE

from backcast.errors import FatalError, TransientError, UsageError

CALLS = Path("calls")
"""In the folder that the worker was started in: one file for each key, one byte for each call."""


def call(key: str) -> int:
    with (CALLS / key).open("a") as file:
        file.write(".")
        return file.tell()


@task
async def add(key: str, a: int, b: int) -> Any:
    call(key)
    return [key, a + b]


@task
def reverse(key: str, text: str) -> Any:
    call(key)
    time.sleep(0.02)  # holds its thread
    return [key, text[::-1]]


@task
async def doze(key: str, seconds: float) -> Any:
    call(key)
    await asyncio.sleep(seconds)
    return [key, seconds]


@task(retries=5, retry_delay_seconds=0.3, retry_jitter_factor=0.5)
async def stumble(key: str, fails: int) -> Any:
    if (calls := call(key)) <= fails:
        raise TransientError(f"call {calls} of {key}")
    return [key, fails]


@task(retries=2, retry_delay_seconds=0.1)
async def refuse(key: str, kind: str) -> None:
    call(key)
    raise {"usage": UsageError, "fatal": FatalError, "plain": ValueError}[kind](f"{key}, as asked")


@task(cache_policy=INPUTS + TASK_SOURCE)
async def square(key: str, number: int) -> Any:
    call(key)
    await asyncio.sleep(0.1)
    return [key, number * number]


@task
async def measure(key: str, text: str) -> Any:
    """Takes a large input."""
    call(key)
    return [key, len(text), hashlib.sha256(text.encode()).hexdigest()]


@task
async def enlarge(key: str, word: str, times: int) -> Any:
    """Returns a large result."""
    call(key)
    return [key, word * times]


@task
async def offend(key: str, kind: str) -> Any:
    """Its first call blocks, crashes or ends its process."""
    if call(key) == 1:
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


@task(timeout_seconds=0.5)
async def dawdle(key: str) -> None:
    call(key)
    await asyncio.sleep(60)
