"""Kills, stops and restarts a real process under the same name, address and log."""

import contextlib
import signal
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.waiting import until


@dataclass(eq=False)
class Process:
    name: str
    command: Callable[[], list[str]]
    environ: dict[str, str]
    log: Path
    cwd: Path
    look: Callable[[], Awaitable[bool]]
    """Whether it is ready."""
    child: subprocess.Popen[bytes] | None = None
    pids: list[int] = field(default_factory=list[int])
    """Of each time that it was started."""
    is_wanted: bool = False
    """False while a fault keeps it down."""

    def start(self) -> None:
        """Start it unless it runs. Only on the main thread: PostgreSQL stops when the thread that started it ends."""
        self.is_wanted = True
        if not self.is_running:
            with self.log.open("ab") as out:
                self.child = subprocess.Popen(
                    self.command(), env=self.environ, cwd=self.cwd, stdout=out, stderr=out, start_new_session=True
                )
            self.pids.append(self.child.pid)

    @property
    def is_running(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send the signal to the process and then to all that it started."""
        if self.is_running:
            assert self.child is not None
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(self.child.pid)
                for one in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.send_signal(number)

    def kill(self) -> None:
        self.is_wanted = False
        self.send(signal.SIGKILL)
        if self.child is not None:
            self.child.wait()

    async def terminate(self, *, timeout: float) -> bool:
        """SIGTERM to the process alone; returns whether it ended by itself in time."""
        self.is_wanted = False
        if self.is_running:
            assert self.child is not None
            self.child.terminate()

        async def look() -> bool:
            return not self.is_running

        try:
            ended = await until(look, timeout=timeout)
        except AssertionError:
            ended = False
        self.kill()
        return ended
