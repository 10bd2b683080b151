"""The history sink: our client of Prefect's API. Keeps the latest event of each run, and the log lines of tasks, and
posts them in bulk; no run waits for it, and it retries for as long as the server is away. Which runs to ask about or to
delete is decided elsewhere.
"""

import asyncio
import json
import logging
import tempfile
import threading
from collections import OrderedDict, deque
from datetime import datetime
from functools import partial
from typing import IO, Any, Protocol
from uuid import UUID

import httpx

from backcast.history.events import RESOURCE, Change, event
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
"""Events or log lines in one post (events: 200 KB), and runs in one query, which is the server's limit."""
IN_MEMORY = 20_000
"""Events kept in memory while the server is away, about 14 MB; more go to a temporary file."""
LOGS = 16 * 1024 * 1024
"""Bytes of log lines kept while the server is away; the oldest are dropped first."""
AT_ONCE = 8
"""Concurrent deletions; the server has no route that deletes several runs."""


class Sink:
    """Any thread may call `publish`, `record`, `keep_event` and `keep_log`; `run` belongs to one event loop."""

    def __init__(self, server: Prefect) -> None:
        # A change becomes JSON only when it is posted: most are replaced by the next change of their run.
        self._waiting: OrderedDict[str, bytes | Change | Event] = OrderedDict()
        self._logs: deque[bytes] = deque()
        self._log_bytes = 0
        self._lock = threading.Lock()
        self._spool: IO[bytes] | None = None
        auth = server.auth_string.get_secret_value().partition(":") if server.auth_string else None
        self._client = httpx.AsyncClient(
            base_url=(server.api_url or "").rstrip("/"),
            auth=(auth[0], auth[2]) if auth else None,
            headers={"content-type": "application/json"}
            | ({"authorization": f"Bearer {server.api_key.get_secret_value()}"} if server.api_key else {}),
            timeout=30,
        )
        self.is_enabled = server.api_url is not None and server.history

    # -- publishing ---------------------------------------------------------------------------------------------------

    def publish(self, change: Change) -> None:
        if self.is_enabled:
            self._keep(f"{RESOURCE}{change.run}", change)

    def record(self, entry: Entry) -> None:
        """Publish the ledger's state of a run, if no engine has published it: that it waits, or how it ended."""
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
            self._spool.write(_written(self._waiting.popitem(last=False)[1]) + b"\n")

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

    async def run(self) -> None:
        """Post for ever; while the server is away, the newest event of each run waits."""
        outage = Outage(partial(log.warning, "Prefect can't be reached (%s): runs go on, their history follows"))
        delay, delays = INTERVAL, backoff(1.0, 15.0)
        while True:
            await asyncio.sleep(delay)
            try:
                await self._flush()
            except httpx.HTTPError as error:
                outage.failed(type(error).__name__)
                delay = next(delays)
            else:
                if outage:
                    log.info("Prefect is back")
                outage.is_over()
                delay, delays = INTERVAL, backoff(1.0, 15.0)

    async def aclose(self, timeout: float) -> None:
        """Post what is left, for at most `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._flush()
        except (TimeoutError, httpx.HTTPError):
            log.warning("%d events were not published to Prefect before the process ended", self.waiting)
        await self._client.aclose()

    async def _flush(self) -> None:
        while True:
            self._unspill()
            with self._lock:
                batch = [self._waiting.popitem(last=False) for _ in range(min(BATCH, len(self._waiting)))]
            if not batch:
                break
            try:
                await self._post("/events", [_written(item) for _, item in batch])
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
                await self._post("/logs/", lines)
            except BaseException:
                with self._lock:
                    self._logs.extendleft(reversed(lines))
                    self._log_bytes += sum(map(len, lines))
                raise

    async def _post(self, path: str, batch: list[bytes]) -> None:
        response = await self._client.post(path, content=b"[" + b",".join(batch) + b"]")
        if response.status_code == 422 and len(batch) > 1:  # one of them is refused: find it
            middle = len(batch) // 2
            await self._post(path, batch[:middle])
            await self._post(path, batch[middle:])
        elif response.status_code == 422:
            log.warning("Prefect refused one of %s: %s", path, response.text[:300])
        else:
            response.raise_for_status()

    # -- queries, deletions -------------------------------------------------------------------------------------------

    async def count(self, ids: list[UUID], state_type: str) -> int:
        """The number of these runs (up to 1,000) that the server has in this state; costs a thirtieth of `states`.

        Raises:
            httpx.HTTPError: the server is away.
        """
        wanted = {"id": {"any_": [str(one) for one in ids]}, "state": {"type": {"any_": [state_type]}}}
        response = await self._client.post("/task_runs/count", json={"task_runs": wanted})
        response.raise_for_status()
        return int(response.json())

    async def states(self, ids: list[UUID]) -> dict[UUID, str | None]:
        """The state types (COMPLETED, …) of these runs as the server has them; None where it has no such run.

        Raises:
            httpx.HTTPError: the server is away.
        """
        known: dict[UUID, str | None] = dict.fromkeys(ids)
        for start in range(0, len(ids), BATCH):
            asked = [str(one) for one in ids[start : start + BATCH]]
            for run in await self._filter({"id": {"any_": asked}}, limit=len(asked)):
                known[UUID(run["id"])] = run["state_type"]
        return known

    async def delete_ended(self, before: datetime, limit: int) -> int:
        """Delete up to `limit` of the server's task runs without a flow that ended before this time; return how many.

        The server removes their logs a moment later. Its route deletes one run at a time.

        Raises:
            httpx.HTTPError: the server is away.
        """
        deleted = 0
        old = {"end_time": {"before_": before.isoformat()}, "flow_run_id": {"is_null_": True}}
        gate = asyncio.Semaphore(AT_ONCE)

        async def delete(run_id: str) -> None:
            async with gate:
                response = await self._client.delete(f"/task_runs/{run_id}")
                if response.status_code != 404:  # 404: it is already gone
                    response.raise_for_status()

        while deleted < limit:
            runs = await self._filter(old, limit=min(BATCH, limit - deleted))
            await asyncio.gather(*[delete(run["id"]) for run in runs])
            deleted += len(runs)
            if not runs:
                break
        return deleted

    async def _filter(self, wanted: dict[str, Any], *, limit: int) -> list[dict[str, Any]]:
        # This order has an index, and the filter by end uses it too.
        query = {"task_runs": wanted, "limit": limit, "sort": "END_TIME_DESC"}
        response = await self._client.post("/task_runs/filter", json=query)
        response.raise_for_status()
        return list(response.json())


def _written(item: bytes | Change | Event) -> bytes:
    match item:
        case bytes():
            return item
        case Change():
            return event(item)
        case _:
            return item.model_dump_json().encode()
