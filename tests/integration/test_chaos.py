"""The short chaos: every kind of fault once, with a fixed seed. `make chaos` is the long one."""

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from tests.support.stack import ROOT


@pytest.mark.timeout(1900)
async def test_nothing_is_lost_in_a_storm(tmp_path: Path) -> None:
    log = tmp_path / "chaos.log"
    output = log.open("wb")
    command = [sys.executable, "-m", "tests.chaos", "--minutes=1.1", "--seed=1", "--settle=300", f"--folder={tmp_path}"]
    chaos = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=output, stderr=output)
    try:
        async with asyncio.timeout(1800):
            await chaos.wait()
    except TimeoutError:
        chaos.send_signal(signal.SIGINT)  # it ends what it has started
        await chaos.wait()
    output.close()
    assert chaos.returncode == 0, log.read_text()
