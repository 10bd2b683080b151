"""Keeps one child process of `backcast up` running, until it is stopped.

Decides when the process is started again and which of its lines a person sees; knows nothing of the product.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from backcast.errors import ConfigurationError
from backcast.local import ports

DELAYS = (0.5, 1, 2, 5, 30)
"""Seconds before a restart, after one, two, … deaths within a minute; the last is for a process with little hope."""
LONGEST = 1 << 20
"""Bytes of a line that are shown; the log file has all of it."""
_TIME = re.compile(r"^[\d-]{10}T[\d:.]{12}Z ")
_OURS = r"(?!Traceback|During handling|The above exception|\s)"  # of a traceback, only the last line
_WORTH = {  # the lines of a process that a person sees; its log file has them all
    "postgres": r".*(WARNING|ERROR|PANIC|FATAL): (?!.*(starting up|shutting down|not yet acc|administrator command))",
    "prefect": r".*\b(ERROR|CRITICAL)\b",
    "model": r"ERROR|WARNING",
    "api": _OURS + r"(?!INFO +[A-Z]+ [/(])",  # requests
    # Before Prefect is up these are normal.
    "worker": _OURS + r"(?!.*(Prefect (can't be reached|is back)|Error logging to API))",
    "steward": _OURS + r"(?!.*(Prefect (can't be reached|is back)|can't (publish new|reconcile|remove old) history))",
}
# The kernel ends a child when `up` is gone, even by SIGKILL (Linux only). This takes a program of its own: code
# between fork and exec (`preexec_fn`) may deadlock when there are threads.
_TOGETHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]))
os.getppid() == int(sys.argv[2]) and os.execvp(sys.argv[3], sys.argv[3:])
"""


async def _nothing() -> None:
    pass


def _raise(error: ConfigurationError) -> None:
    raise error


@dataclass(slots=True, eq=False)
class Child:
    """A process that is started again whenever it ends, until it is stopped."""

    name: str
    command: Callable[[], list[str]]
    environ: Mapping[str, str]
    log: Path
    show: Callable[[str, str, str], None]
    """Print a line: the process's name, the text, its style."""
    stop_by: signal.Signals = signal.SIGTERM
    prepare: Callable[[], Awaitable[None]] = _nothing
    """Awaited before each start."""
    give_up: Callable[[ConfigurationError], None] = _raise
    """Called when a start raises this error, which no further start would mend."""
    folder: Path | None = None
    """Its working directory; none means ours."""
    _stopping: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _child: asyncio.subprocess.Process | None = field(default=None, init=False)
    _running: asyncio.Task[None] | None = field(default=None, init=False)

    def start(self) -> Self:
        self._running = asyncio.create_task(self._run())
        return self

    def listens(self, port: int) -> bool:
        """Whether the running process, or one that it has started, listens on this port."""
        return self._child is not None and ports.listens(self._child.pid, port)

    def send(self, number: signal.Signals) -> None:
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(number)

    async def stop(self, patience: float) -> None:
        """Ask it to end; after `patience` seconds it is killed."""
        self._stopping.set()
        if self._running is None:
            return
        self.send(self.stop_by)
        if not (await asyncio.wait([self._running], timeout=patience))[0]:
            self.show(self.name, f"has not stopped within {patience:g} s: killed", "yellow")
            self.send(signal.SIGKILL)
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        deaths: deque[float] = deque(maxlen=len(DELAYS))
        while not self._stopping.is_set():
            last: deque[str] = deque(maxlen=12)
            try:
                code = await self._run_once(last)
            except ConfigurationError as error:
                self.give_up(error)
                return
            except Exception as error:  # noqa: BLE001  # it could not be started at all
                code = 1
                self.show(self.name, str(error) or repr(error), "red")
            if self._stopping.is_set():
                return
            deaths.append(time.monotonic())
            recent = sum(time.monotonic() - death < 60 for death in deaths)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            if recent == len(DELAYS):
                how += f" for the {recent}th time within a minute; the reason may be above or in {self.log}"
                for line in last:
                    self.show(self.name, line, "dim")
            self.show(self.name, f"{how}; starting it again in {DELAYS[recent - 1]:g} s", "red")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), DELAYS[recent - 1])

    async def _run_once(self, last: deque[str]) -> int:
        await self.prepare()
        command = self.command()
        if sys.platform == "linux":
            with_us = signal.SIGKILL if self.stop_by == signal.SIGTERM else self.stop_by
            command = [sys.executable, "-ISc", _TOGETHER, str(int(with_us)), str(os.getpid()), *command]
        worth = re.compile(_WORTH.get(self.name, _OURS))

        def take(line: str) -> None:
            last.append(line)
            line = _TIME.sub("", line)
            if worth.match(line):
                self.show(self.name, line.removeprefix("INFO").lstrip(), "")

        with self.log.open("ab", buffering=0) as log:
            # A pipe of our own: with asyncio's, the end of the process is reported only after that of the pipe, which a
            # grandchild may hold for ever (Python 3.11).
            reads, writes = os.pipe()
            connect = asyncio.get_running_loop().connect_read_pipe
            pipe, output = await connect(lambda: _Output(log.write, take), os.fdopen(reads, "rb", 0))
            try:
                try:
                    self._child = await asyncio.create_subprocess_exec(
                        *command,
                        env=self.environ,
                        cwd=self.folder,
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=writes,
                        stderr=asyncio.subprocess.STDOUT,
                        start_new_session=True,  # the terminal's Ctrl-C is for us: we stop the children in order
                    )
                finally:
                    os.close(writes)
                if self._stopping.is_set():
                    self.send(self.stop_by)
                code = await self._child.wait()
                with contextlib.suppress(ProcessLookupError, PermissionError):  # what it has left may hold its port
                    os.killpg(self._child.pid, signal.SIGKILL)
                await asyncio.wait([output.ended], timeout=1)  # a grandchild in a session of its own may hold the pipe
                return code
            finally:
                pipe.close()


class _Output(asyncio.Protocol):
    """Keeps what a process writes, and takes its lines one by one. It reads whatever comes: a process whose output
    nobody reads stops in its next print."""

    def __init__(self, keep: Callable[[bytes], object], take: Callable[[str], None]) -> None:
        self._keep, self._take = keep, take
        self._line = bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk
            self._keep(data)
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._add(end)
            if line := self._line.decode(errors="replace").rstrip():
                with contextlib.suppress(OSError):  # the terminal is gone
                    self._take(line)
            self._line.clear()
        self._add(rest)

    def _add(self, piece: bytes) -> None:
        self._line += piece[: LONGEST - len(self._line)]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.data_received(b"\n" if self._line else b"")  # a last line without an end
        if not self.ended.done():
            self.ended.set_result(None)
