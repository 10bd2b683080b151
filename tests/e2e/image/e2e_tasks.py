"""Tasks of a user for the tests on a cluster: work of every size, and a look around from inside a worker."""

import asyncio
import hashlib
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from prefect import task


@task
async def add(key: str, a: int, b: int) -> list[Any]:
    return [key, a + b]


@task
async def nap(key: str, seconds: float) -> list[Any]:
    await asyncio.sleep(seconds)
    return [key, seconds]


@task
def enlarge(key: str, word: str, times: int) -> list[Any]:
    """A result that is too large to be kept in the ledger."""
    return [key, word * times]


@task
def measure(key: str, text: str) -> list[Any]:
    """An input that is too large for the ledger."""
    return [key, hashlib.sha256(text.encode()).hexdigest()]


@task
async def look_around() -> dict[str, Any]:
    """The view of code in a worker: its user and host, the folders that it may write, its environment."""
    return {
        "uid": os.getuid(),
        "host": socket.gethostname(),
        "token": Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists(),
        "writable": [folder for folder in ("/", "/app", "/opt", "/tmp", "/usr") if _is_writable(folder)],
        "environment": {name: hashlib.sha256(value.encode()).hexdigest() for name, value in os.environ.items()},
    }


def _is_writable(folder: str) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@task
async def reach(places: list[str], seconds: float = 4) -> dict[str, str]:
    """Whether a connection can be opened to each `host:port`."""
    return dict(zip(places, await asyncio.gather(*(_reach(place, seconds) for place in places)), strict=True))


async def _reach(place: str, seconds: float) -> str:
    host, _, port = place.rpartition(":")
    try:
        async with asyncio.timeout(seconds):
            _, writer = await asyncio.open_connection(host, int(port))
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return type(error).__name__
    writer.close()
    return "open"
