"""Takes what the code of runs reports, from any thread, and sends it to the supervisor: the newest progress, all events
and all lines of its log, at most every 0.1 s. Decides how much an attempt may report.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from backcast import protocol
from backcast.executor.redaction import redacted
from backcast.executor.values import to_json
from backcast.process.channel import Channel
from backcast.protocol import Event, Line, Progress, Reports
from backcast.reporting import DROPPED
from backcast.texts import storable

EVERY = 0.1
"""Seconds between two messages about a run."""
MOST, MOST_BYTES, LARGEST = 1000, 256 * 1024, 32 * 1024
"""Events of an attempt, the bytes of their data in all, and of one."""
MOST_LINES, MOST_LOGGED, LONGEST = 10_000, 1024 * 1024, 16 * 1024
"""Lines of an attempt's log, the bytes of their messages in all, and the characters of one that are kept."""
NAME = 200
"""Characters of the names of a logger and of a level that are kept."""


class RunReports:
    """The reports of one attempt. Implements `reporting.Reporter`."""

    # Every run makes one of these, and few report: so values that do not change stay in the class.
    _progress: Progress | None = None
    _count = _bytes = _dropped = 0
    _line_count = _logged = _lost = 0
    _is_due = _is_over = False

    def __init__(self, run: bytes, channel: Channel, retries: Callable[[], int]) -> None:
        """`retries` counts those of the run so far."""
        self._run, self._channel, self._retries = run, channel, retries
        self._loop = asyncio.get_running_loop()
        self._lock = threading.RLock()  # a destructor may report wherever this allocates
        self._events: list[Event] = []
        self._lines: list[Line] = []
        self._unfinished: dict[str, str] = {}
        """What was written to each stream since its last line break."""

    def progress(self, fraction: float | None, message: str) -> None:
        with self._lock:
            newest = Progress(fraction, storable(message), time.time(), self._retries(), after=len(self._events))
            self._progress = newest
        self._send_soon()

    def emit(self, kind: str, data: Any) -> None:
        body = to_json(data, verb="emitted")
        with self._lock:
            if self._count >= MOST or len(body) > LARGEST or self._bytes + len(body) > MOST_BYTES:
                self._dropped += 1
                return
            self._count, self._bytes = self._count + 1, self._bytes + len(body)
            self._events.append(Event(storable(kind), body.decode(), time.time(), self._retries()))
        self._send_soon()

    def log(self, level: str, logger: str, text: str) -> None:
        """Take a line of the run's log; it may have line breaks."""
        with self._lock:
            self._add_line(level, logger, text)
        self._send_soon()

    def write(self, stream: str, text: str) -> None:
        """Take what is written to a stream: each line of it is one of the run's log."""
        with self._lock:
            room = max(0, MOST_LINES - self._line_count)
            *lines, rest = (self._unfinished.pop(stream, "") + text).split("\n", room)
            if beyond := rest.count("\n"):  # one by one they would keep the lock for long, which the loop waits for
                self._lost += beyond
                rest = rest[rest.rfind("\n") + 1 :]
            if len(rest) > LONGEST:
                lines, rest = [*lines, rest], ""
            self._unfinished[stream] = rest
            for line in lines:
                self._add_line("INFO", stream, line)
        if lines:
            self._send_soon()

    def retried(self) -> None:
        """The next attempt begins at once: what is written from here on is on new lines."""
        with self._lock:
            self._end_lines()

    def _end_lines(self) -> None:
        unfinished, self._unfinished = self._unfinished, {}
        for stream, text in unfinished.items():
            if text:
                self._add_line("INFO", stream, text)

    def _add_line(self, level: str, logger: str, text: str, *, is_last: bool = False) -> None:
        text = storable(text[:LONGEST])
        size = len(text.encode())
        if not is_last and (self._line_count >= MOST_LINES or self._logged + size > MOST_LOGGED):
            self._lost += 1
            return
        self._line_count, self._logged = self._line_count + 1, self._logged + size
        level, logger = storable(level[:NAME]), storable(logger[:NAME])
        line = json.dumps({"at": _now(), "level": level, "logger": logger, "message": text}, ensure_ascii=False)
        self._lines.append(Line(line, self._retries()))

    def _send_soon(self) -> None:
        with self._lock:
            if self._is_due or self._is_over:
                return
            self._is_due = True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._send)

    def _send(self) -> None:
        """On the loop. What is reported in the next `EVERY` seconds goes then."""
        with self._lock:
            self._is_due = not self._is_over and any((self._progress, self._events, self._lines))
            if self._is_due:
                self._loop.call_later(EVERY, self._send)  # first: what fails below keeps back no later report
                self._flush()

    def _flush(self) -> None:
        given = Reports(self._progress, self._events, self._lines)
        self._progress, self._events, self._lines = None, [], []
        if given.lines:  # all at once, which costs less than one by one
            texts = redacted("\n".join(line.text for line in given.lines)).split("\n")
            given.lines[:] = [line._replace(text=text) for line, text in zip(given.lines, texts, strict=True)]
        if any(given):
            self._channel.send(protocol.reports(self._run, given))

    def close(self) -> None:
        """Send what is left; the attempt is over. Code that it has left running reports in vain."""
        with self._lock:
            self._is_over = True
            if self._dropped:
                self._events.append(Event(DROPPED, str(self._dropped), time.time(), self._retries()))
            self._end_lines()
            if self._lost:
                self._add_line("WARNING", "backcast", f"{self._lost} further lines were dropped", is_last=True)
            self._flush()


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
