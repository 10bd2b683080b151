"""The history sink: keeps the latest event of each run, and the log lines of tasks, and publishes them in bulk. No run
waits for it, and it retries for as long as the server is away. Its memory and its file are bounded.
"""

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from uuid import UUID

import httpx

from backcast.errors import LedgerUnavailable
from backcast.history import cleaning
from backcast.history.delivery import Delivery, Refused, Undelivered
from backcast.history.events import RESOURCE, Change, event
from backcast.history.server import PrefectServer
from backcast.history.spool import Spool
from backcast.ledger.history import Entry
from backcast.process.outages import Outage, backoff
from backcast.settings import Prefect


class Event(Protocol):
    """One of Prefect's own events; this module does not import Prefect."""

    def model_dump_json(self) -> str: ...

    def model_dump(self) -> dict[str, Any]: ...


log = logging.getLogger("backcast.history")

INTERVAL = 0.5
"""Seconds between two posts: a run that starts and ends within them costs the server one event, not two."""
BATCH = 200
"""Events or log lines in one post."""
BATCH_BYTES = 512 * 1024
"""Bytes of one post, unless its first item has more: proxies often refuse more than 1 MiB."""
IN_MEMORY = 20_000
"""Events kept in memory while the server is away, about 14 MB; more go to the spool."""
MEMORY = 16 * 1024 * 1024
"""Bytes of events kept in memory, and bytes of log lines; the oldest lines are dropped first."""
SPILLED = 1000
"""Events that go to the spool at a time, in about 20 ms."""
REPORTED = 60.0
"""Seconds between two lines in the log about items that Prefect refuses."""

Item = bytes | Change | dict[str, Any]
"""JSON; a change, which becomes JSON only when it is posted, as most are replaced by the next one of their run; or an
event of Prefect's own, which may still need the tag."""


def _ignored(_why: str, _count: int) -> None:
    pass


class Sink:
    """Any thread may call `publish`, `record`, `keep_event` and `keep_log`; `run` belongs to one event loop."""

    def __init__(self, settings: Prefect, dropped: Callable[[str, int], object] = _ignored) -> None:
        """`dropped` is called with the reason and the number of items that Prefect never gets."""
        self._waiting: OrderedDict[str, tuple[Item, int]] = OrderedDict()
        self._bytes = 0
        self._logs: deque[bytes] = deque()
        self._log_bytes = 0
        self._lock = threading.RLock()  # a destructor may come here wherever this allocates
        self._spool = Spool(settings.spool)
        self._numbers = iter(range(1 << 62))
        self.tag: str | None = None
        """Every run that this ledger publishes carries it: retention deletes no other run. None: not known yet."""
        self.server = PrefectServer(settings)
        self._events, self._lines = Delivery(self.server, "/events"), Delivery(self.server, "/logs/")
        self.is_enabled = settings.api_url is not None and settings.history
        self.dropped = Counter[str]()
        """Events and log lines that Prefect never gets, by reason."""
        self._report_dropped = dropped
        self._caught_up = time.monotonic()
        """When all that waited then had been published."""
        self._is_full = Outage(partial(log.warning, "history is dropped until Prefect is back: %s"))
        self._unreported, self._reported = 0, -REPORTED

    @property
    def figures(self) -> dict[str, float]:
        """By the names of `metrics.HISTORY`."""
        return {
            "waiting": self.waiting,
            "waiting_bytes": self._bytes + self._log_bytes,
            "spooled_bytes": self._spool.size,
            "lag_seconds": time.monotonic() - self._caught_up if self.waiting or self._logs else 0.0,
        }

    def _count_dropped(self, why: str, count: int) -> None:
        self.dropped[why] += count
        self._report_dropped(why, count)

    # -- publishing ---------------------------------------------------------------------------------------------------

    def publish(self, change: Change) -> None:
        if self.is_enabled:
            if change.message and len(change.message) > cleaning.TEXT:
                change = replace(change, message=cleaning.text(change.message))
            self._keep(f"{RESOURCE}{change.run}", change, 1000 + len(change.message or ""))

    def record(self, entry: Entry) -> None:
        """Publish the ledger's state of a run: that it waits, or how it ended. It overrides an engine's events."""
        self.publish(Change.from_ledger(entry))

    def keep_event(self, key: str, event: Event) -> None:
        """Publish an event that Prefect itself has made; of two with one key, the later one."""
        if self.is_enabled:
            try:
                body = json.loads(event.model_dump_json())
            except ValueError:  # its text is no UTF-8
                body = event.model_dump()
            cleaned = cleaning.clean(body)
            self._keep(key, cleaned, len(cleaning.dumps(cleaned)))

    def keep_log(self, line: dict[str, Any]) -> None:
        line.pop("__payload_size__", None)  # Prefect's own note
        if self.is_enabled:
            body = cleaning.line(line)
            with self._lock:
                self._logs.append(body)
                self._log_bytes += len(body)
                self._shed_logs()

    def _shed_logs(self) -> None:
        shed = 0
        while self._log_bytes > MEMORY:
            self._log_bytes -= len(self._logs.popleft())
            shed += 1
        self._shed(shed, "log lines")

    def _shed(self, count: int, of: str) -> None:
        if count:
            self._count_dropped("no_room", count)
            self._is_full.failed(f"there is no more room for {of}")

    def _keep(self, key: str, item: Item, size: int) -> None:
        with self._lock:
            self._put(key, item, size)
            if len(self._waiting) > IN_MEMORY or self._bytes > MEMORY:
                oldest = [self._pop()[1] for _ in range(min(SPILLED, len(self._waiting)))]
                self._shed(self._spool.write(filter(None, map(self._written, oldest))), "events")

    def _put(self, key: str, item: Item, size: int, *, first: bool = False) -> None:
        if key in self._waiting:
            self._bytes -= self._waiting.pop(key)[1]
        self._waiting[key] = item, size
        self._bytes += size
        if first:
            self._waiting.move_to_end(key, last=False)

    def _pop(self) -> tuple[str, Item, int]:
        key, (item, size) = self._waiting.popitem(last=False)
        self._bytes -= size
        return key, item, size

    def _written(self, item: Item) -> bytes | None:
        try:
            return _written(item, self.tag)
        except Exception as error:  # noqa: BLE001  # whatever a task has made of it
            self._drop([(repr(item).encode("ascii", "replace"), f"it can't be written as JSON: {error}")])
            return None

    def _unspill(self) -> None:
        """Take back the oldest piece of the spool once nothing else waits. The server keeps the newest state of a run
        by its time, so the order of posting does not matter."""
        with self._lock:
            if not self._waiting:
                for body in self._spool.read():
                    self._put(f"spooled-{next(self._numbers)}", body, len(body))

    # -- posting ------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting) + self._spool.count

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
        """Post what is left, for at most `timeout` seconds. The steward later publishes the ends of runs for which that
        is too short; only the other items are lost."""
        with contextlib.suppress(TimeoutError, httpx.ConnectError):
            async with asyncio.timeout(timeout):
                for delay in backoff(0.1, 1.0):
                    try:
                        await self._flush()
                        break
                    except httpx.ConnectError:
                        raise
                    except httpx.HTTPError:
                        await asyncio.sleep(delay)
        lost = len(self._logs) + sum(not isinstance(item, Change) for item, _ in self._waiting.values())
        if lost:
            text = "%d log lines and states of inner tasks were not published to Prefect before the process ended"
            log.warning(text, lost)
        self._spool.close()
        await self.server.aclose()

    async def _flush(self) -> None:
        """Post all that waits. Raises `httpx.HTTPError`; a server that takes no events may still take log lines."""
        failed, posts = None, [self._post_events, self._post_logs]
        while posts:
            for post in tuple(posts):
                try:
                    is_more = await post()
                except Undelivered as error:
                    if not isinstance(error.__cause__, httpx.HTTPError):  # cancelled
                        raise asyncio.CancelledError from error
                    failed, is_more = failed or error.__cause__, False
                if not is_more:
                    posts.remove(post)
        if failed is not None:
            raise failed
        self._caught_up = time.monotonic()
        self._is_full.ended()

    async def _post_events(self) -> bool:
        """Whether it was all that one post takes: what has come meanwhile waits for the next time, to be merged."""
        self._unspill()
        kept, bodies = dict[bytes, tuple[str, Item, int]](), list[bytes]()
        with self._lock:
            if not self._waiting:
                return False
            room = BATCH_BYTES
            while self._waiting and len(bodies) < BATCH and room > 0:
                key, item, size = self._pop()
                if (body := self._written(item)) is not None:
                    bodies.append(body)
                    kept[body] = key, item, size
                    room -= len(body)
        try:
            self._drop(await self._events.send(bodies))
        except Undelivered as error:
            self._drop(error.refused)
            with self._lock:
                for key, item, size in [kept[body] for body in reversed(error.rest)]:
                    if key not in self._waiting:  # otherwise a newer event of the same run has come
                        self._put(key, item, size, first=True)
            raise
        return len(bodies) == BATCH or room <= 0 or self._spool.count > 0

    async def _post_logs(self) -> bool:
        lines = list[bytes]()
        with self._lock:
            room = BATCH_BYTES
            while self._logs and len(lines) < BATCH and room > 0:
                lines.append(self._logs.popleft())
                room -= len(lines[-1])
            self._log_bytes -= BATCH_BYTES - room
        if not lines:
            return False
        try:
            self._drop(await self._lines.send(lines))
        except Undelivered as error:
            self._drop(error.refused)
            with self._lock:
                self._logs.extendleft(reversed(error.rest))
                self._log_bytes += sum(map(len, error.rest))
                self._shed_logs()
            raise
        return len(lines) == BATCH or room <= 0

    def _drop(self, refused: list[Refused]) -> None:
        """Count them; report the first one, and later ones seldom."""
        if not refused:
            return
        self._count_dropped("refused", len(refused))
        self._unreported += len(refused)
        if time.monotonic() - self._reported >= REPORTED:
            body, why = refused[0]
            text = "dropped from history, because Prefect can't take it (%s; %d since the last such line): %s"
            log.warning(text, why, self._unreported, body[:300].decode(errors="replace"))
            self._unreported, self._reported = 0, time.monotonic()


def _written(item: Item, tag: str | None) -> bytes:
    match item:
        case bytes():
            return item
        case Change():
            return cleaning.plain(event(item, tag))
        case _:
            run = item["payload"].get("task_run") if isinstance(item.get("payload"), dict) else None
            if tag and isinstance(run, dict) and tag not in run.get("tags", ()):  # of a task that a task has called
                run["tags"] = [*run.get("tags", ()), tag]
            return cleaning.dumps(item)
