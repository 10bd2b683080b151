"""Takes what the code of runs reports, from any thread, and sends it to the supervisor: the newest progress and all
events, at most every 0.1 s. Decides how much an attempt may report.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from backcast import protocol
from backcast.executor.values import to_json
from backcast.process.channel import Channel
from backcast.protocol import Event, Progress, Reports
from backcast.reporting import DROPPED
from backcast.texts import storable

EVERY = 0.1
"""Seconds between two messages about a run."""
MOST, MOST_BYTES, LARGEST = 1000, 256 * 1024, 32 * 1024
"""Events of an attempt, the bytes of their data in all, and of one."""


class RunReports:
    """The reports of one attempt. Implements `reporting.Reporter`."""

    def __init__(self, run: bytes, channel: Channel, retries: Callable[[], int]) -> None:
        """`retries` counts those of the run so far."""
        self._run, self._channel, self._retries = run, channel, retries
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._events = list[Event]()
        self._count = self._bytes = self._dropped = 0
        self._is_due = self._is_over = False

    def progress(self, fraction: float | None, message: str) -> None:
        with self._lock:
            newest = Progress(fraction, storable(message), time.time(), self._retries(), after=len(self._events))
            self._progress = newest
        self._send_soon()

    def emit(self, kind: str, data: Any) -> None:
        text = to_json(data, verb="emitted").decode()
        with self._lock:
            if self._count >= MOST or len(text) > LARGEST or self._bytes + len(text) > MOST_BYTES:
                self._dropped += 1
                return
            self._count, self._bytes = self._count + 1, self._bytes + len(text)
            self._events.append(Event(storable(kind), text, time.time(), self._retries()))
        self._send_soon()

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
            if self._is_over:
                return
            given = self._taken()
            self._is_due = given is not None
        if given is not None:
            self._channel.send(protocol.reports(self._run, given))
            self._loop.call_later(EVERY, self._send)

    def _taken(self) -> Reports | None:
        if self._progress is None and not self._events:
            return None
        given = Reports(self._progress, self._events)
        self._progress, self._events = None, []
        return given

    def close(self) -> None:
        """Send what is left; the attempt is over. Code that it has left running reports in vain."""
        with self._lock:
            self._is_over = True
            if self._dropped:
                self._events.append(Event(DROPPED, str(self._dropped), time.time(), self._retries()))
            given = self._taken()
        if given is not None:
            self._channel.send(protocol.reports(self._run, given))
