"""The history sink: keeps the latest event of each run, and the log lines of tasks, and publishes them in bulk. No run
waits for it, and it retries for as long as the server is away.
"""

import asyncio
import contextlib
import json
import logging
import tempfile
import threading
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import IO, Any, Protocol
from uuid import UUID

import httpx

from backcast.errors import LedgerUnavailable
from backcast.history.events import RESOURCE, Change, event
from backcast.history.server import PrefectServer
from backcast.ledger.history import Entry
from backcast.process.outages import Outage, backoff
from backcast.settings import Prefect


class Event(Protocol):
    """One of Prefect's own events; this module does not import Prefect."""

    def model_dump_json(self) -> str: ...


log = logging.getLogger("backcast.history")

INTERVAL = 0.5
"""Seconds between two posts: a run that starts and ends within them costs the server one event, not two."""
BATCH = 200
"""Events or log lines in one post (events: 200 KB)."""
IN_MEMORY = 20_000
"""Events kept in memory while the server is away, about 14 MB; more go to a temporary file."""
LOGS = 16 * 1024 * 1024
"""Bytes of log lines kept while the server is away; the oldest are dropped first."""


class Sink:
    """Any thread may call `publish`, `record`, `keep_event` and `keep_log`; `run` belongs to one event loop."""

    def __init__(self, settings: Prefect) -> None:
        # A change becomes JSON only when it is posted: most are replaced by the next change of their run.
        self._waiting: OrderedDict[str, bytes | Change | Event] = OrderedDict()
        self._logs: deque[bytes] = deque()
        self._log_bytes = 0
        self._lock = threading.Lock()
        self._spool: IO[bytes] | None = None
        self.tag: str | None = None
        """Every run that this ledger publishes carries it: retention deletes no other run. None: not known yet."""
        self.server = PrefectServer(settings)
        self.is_enabled = settings.api_url is not None and settings.history

    # -- publishing ---------------------------------------------------------------------------------------------------

    def publish(self, change: Change) -> None:
        if self.is_enabled:
            self._keep(f"{RESOURCE}{change.run}", change)

    def record(self, entry: Entry) -> None:
        """Publish the ledger's state of a run: that it waits, or how it ended. It overrides an engine's events."""
        self.publish(Change.from_ledger(entry))

    def keep_event(self, key: str, event: Event) -> None:
        """Publish an event that Prefect itself has made; of two with one key, the later one."""
        if self.is_enabled:
            self._keep(key, event)

    def keep_log(self, line: dict[str, Any]) -> None:
        line.pop("__payload_size__", None)  # Prefect's own note
        if self.is_enabled:
            body = json.dumps(line).encode()
            with self._lock:
                self._logs.append(body)
                self._log_bytes += len(body)
                while self._log_bytes > LOGS:
                    self._log_bytes -= len(self._logs.popleft())

    def _keep(self, key: str, item: bytes | Change | Event) -> None:
        with self._lock:
            self._waiting.pop(key, None)
            self._waiting[key] = item
            if len(self._waiting) > IN_MEMORY:
                self._spill()

    def _spill(self) -> None:
        self._spool = self._spool or tempfile.TemporaryFile("w+b", prefix="backcast-events-")  # noqa: SIM115  # lives until unspilled
        self._spool.seek(0, 2)
        for _ in range(IN_MEMORY // 2):
            self._spool.write(_written(self._waiting.popitem(last=False)[1], self.tag) + b"\n")

    def _unspill(self) -> None:
        with self._lock:
            if self._spool is None or self._waiting:
                return
            spool, self._spool = self._spool, None
            spool.seek(0)
            # The server keeps the newest state of a run by its time, so the order of posting does not matter.
            self._waiting.update((f"spooled-{n}", line.rstrip(b"\n")) for n, line in enumerate(spool))
            spool.close()

    # -- posting ------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def run(self, identify: Callable[[], Awaitable[UUID]]) -> None:
        """Post for ever; while the server is away, the newest event of each run waits. `identify` asks the ledger for
        its identity, without which nothing is posted. Returns at once where no history is kept."""
        if not self.is_enabled:
            return
        for delay in backoff(0.1, 5.0):
            with contextlib.suppress(LedgerUnavailable):
                self.tag = f"backcast:{await identify()}"
                break
            await asyncio.sleep(delay)
        outage = Outage(partial(log.warning, "Prefect can't be reached (%s): runs go on, their history follows"))
        delays = backoff(1.0, 15.0)
        while True:
            await asyncio.sleep(next(delays) if outage else INTERVAL)
            try:
                await self._flush()
            except httpx.HTTPError as error:
                outage.failed(type(error).__name__)
            else:
                if outage:
                    log.info("Prefect is back")
                outage.ended()
                delays = backoff(1.0, 15.0)

    async def aclose(self, timeout: float) -> None:
        """Post what is left, for at most `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._flush()
        except (TimeoutError, httpx.HTTPError):
            log.warning("%d events were not published to Prefect before the process ended", self.waiting)
        await self.server.aclose()

    async def _flush(self) -> None:
        while True:
            self._unspill()
            with self._lock:
                batch = [self._waiting.popitem(last=False) for _ in range(min(BATCH, len(self._waiting)))]
            if not batch:
                break
            try:
                await self.server.post("/events", [_written(item, self.tag) for _, item in batch])
            except BaseException:
                with self._lock:
                    for key, item in reversed(batch):
                        if key not in self._waiting:  # otherwise a newer event of the same run has come
                            self._waiting[key] = item
                            self._waiting.move_to_end(key, last=False)
                raise
        while True:
            with self._lock:
                lines = [self._logs.popleft() for _ in range(min(BATCH, len(self._logs)))]
                self._log_bytes -= sum(map(len, lines))
            if not lines:
                return
            try:
                await self.server.post("/logs/", lines)
            except BaseException:
                with self._lock:
                    self._logs.extendleft(reversed(lines))
                    self._log_bytes += sum(map(len, lines))
                raise


def _written(item: bytes | Change | Event, tag: str | None) -> bytes:
    match item:
        case bytes():
            return item
        case Change():
            return event(item, tag)
        case _:
            body = json.loads(item.model_dump_json())
            if tag and isinstance(run := body["payload"].get("task_run"), dict):  # of a task that a task has called
                run["tags"] = [*run.get("tags", ()), tag]
            return json.dumps(body).encode()
