"""SIGTERM at every moment of a process's start ends it and leaves no worker behind, also where it is PID 1, as in a
container: there the kernel drops a signal that has no handler."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from backcast.ledger.connection import Ledger
from tests.support.stack import Part, Stack, free_port, stack
from tests.support.waiting import until

_PID_1 = ["unshare", *([] if os.geteuid() == 0 else ["--user"]), "--pid", "--fork", "--kill-child"]
"""Runs a command as the first process of its own namespace."""
_AT_ONCE = 4
NOWHERE = "postgresql://nobody@127.0.0.1:1/none"
PROCESSES = {  # with what keeps one from ever getting ready, where nothing else tells that its start is over
    "api": {},
    "worker": {},
    "steward": {},
    "setup": {"BACKCAST_DATABASE__URL": NOWHERE},
    "await-database": {"BACKCAST_SETUP__PREFECT_URL": NOWHERE.replace("://", "+asyncpg://")},
}


def _catches(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [caught] = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")]
    return bool(caught >> (signal.SIGTERM - 1) & 1)


async def _end(product: Stack, name: str, delay: float, *, first: bool) -> bool:
    """Start it, send SIGTERM after `delay` seconds, and wait for its end. Returns whether it was ready by then."""
    port = free_port()
    settings = PROCESSES[name] | {f"BACKCAST_{part}__PORT": str(port) for part in ("API", "WORKER", "STEWARD")}
    command = [*(_PID_1 if first else []), sys.executable, "-m", "backcast", name]
    part = product.spawn(name, command, f"http://127.0.0.1:{port}", **settings)
    pid = part.process.pid
    if first:
        pid = (await until(lambda: asyncio.to_thread(psutil.Process(pid).children))).pop().pid
        await until(lambda: asyncio.to_thread(_catches, pid), every=0.002)
    await asyncio.sleep(delay)  # the moment under test
    ready = await _is_ready(part)
    os.kill(pid, signal.SIGTERM)
    code = await part.ended()
    assert code in (0, -signal.SIGTERM, 128 + signal.SIGTERM), f"after {delay:.1f} s: {code}\n{part.text}"
    assert "Traceback" not in part.text
    return ready


async def _is_ready(part: Part) -> bool:
    try:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{part.url}/readyz")).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def first() -> bool:
    """Whether the signals go to a PID 1. Any other process may also end by the signal itself, so that shows less; but
    not every machine lets us make namespaces for processes."""
    return subprocess.run([*_PID_1, "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", PROCESSES)
async def test_a_signal_during_the_start_ends_it(
    database: str, ledger: Ledger, tmp_path: Path, name: str, first: bool
) -> None:
    # Every 0.1 s, and later, where little changes, at steps of a fifth; until it is ready.
    delays = itertools.accumulate(itertools.repeat(0.0), lambda delay, _: delay + max(0.1, delay / 5))
    async with stack(database, tmp_path) as product:
        await _end(product, name, 0.0, first=False)
        while batch := list(itertools.islice(delays, _AT_ONCE)):
            ready = await asyncio.gather(*(_end(product, name, delay, first=first) for delay in batch))
            if any(ready) or (PROCESSES[name] and batch[-1] > 2):
                break
    assert await ledger.fetch("select id from workers") == []
