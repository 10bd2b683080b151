"""Shows every run in Prefect's UI without making anyone wait for it. Takes the events that Prefect's engine emits, and
what the ledger alone knows, keeps the last word on each run, and posts them in bulk for as long as it takes.
"""

import asyncio
import json
import logging
import tempfile
import threading
from collections import OrderedDict
from typing import IO, TYPE_CHECKING

import httpx

from backcast.ledger.runs import Told
from backcast.models import JSON, uuid7
from backcast.settings import Prefect

if TYPE_CHECKING:
    from prefect.events.schemas.events import Event

log = logging.getLogger("backcast.mirror")

INTERVAL = 0.5
"""Seconds between two posts: a run that starts and ends within it costs the server one event, not three."""
BATCH = 200
"""Events in one post: about 300 KB."""
IN_MEMORY = 20_000
"""Events kept in memory while the server is away, about 100 MB; more go to a temporary file."""

_STATE = "prefect.task-run."


class Mirror:
    """The queue that Prefect's forwarding client puts events into. `put` comes from Prefect's thread, `run` is ours."""

    def __init__(self, server: Prefect) -> None:
        self._waiting: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._spool: IO[bytes] | None = None
        auth = server.auth_string.get_secret_value().partition(":") if server.auth_string else None
        self._client = httpx.AsyncClient(
            base_url=(server.api_url or "").rstrip("/"),
            auth=(auth[0], auth[2]) if auth else None,
            headers={"content-type": "application/json"},
            timeout=30,
        )
        self.is_enabled = server.api_url is not None and server.history

    def install(self) -> None:
        """Become the destination of this process's Prefect events. Prefect ignores any other client class.

        State changes of runs come straight to us: Prefect's own thread would only look for related flows, which our
        runs do not have, and takes longer over it than the run.
        """
        from prefect.events.worker import EventsWorker, ProcessPoolForwardingEventsClient  # the steward has no Prefect

        EventsWorker.set_client_override(ProcessPoolForwardingEventsClient, event_queue=self)
        worker = EventsWorker.instance()
        send = worker.send

        def take(event: "Event") -> None:
            self.put(("event", event)) if event.event.startswith(_STATE) else send(event)

        worker.send = take  # pyright: ignore[reportAttributeAccessIssue]  # a method is replaced on purpose

    def put(self, item: "tuple[str, Event]") -> None:
        event = item[1]
        if self.is_enabled:
            key = str(event.resource.id if event.event.startswith(_STATE) else event.id)
            self._keep(key, event.model_dump_json().encode())

    def tell(self, run: Told) -> None:
        """Show what the ledger knows of a run and no engine has said: that it waits, or how it ended."""
        if self.is_enabled:
            self._keep(f"{_STATE}{run.id}", json.dumps(_event(run)).encode())

    def _keep(self, key: str, body: bytes) -> None:
        with self._lock:
            self._waiting.pop(key, None)
            self._waiting[key] = body
            if len(self._waiting) > IN_MEMORY:
                self._spill()

    def _spill(self) -> None:
        self._spool = self._spool or tempfile.TemporaryFile("w+b", prefix="backcast-events-")  # noqa: SIM115  # lives until unspilled
        self._spool.seek(0, 2)
        for _ in range(IN_MEMORY // 2):
            self._spool.write(self._waiting.popitem(last=False)[1] + b"\n")

    def _unspill(self) -> None:
        with self._lock:
            if self._spool is None or self._waiting:
                return
            spool, self._spool = self._spool, None
            spool.seek(0)
            # The server keeps the newest state of a run by its time, so the order of posting does not matter.
            self._waiting.update((f"spooled-{n}", line.rstrip(b"\n")) for n, line in enumerate(spool))
            spool.close()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def run(self) -> None:
        """Post events for ever; while the server is away they wait, the newest of each run."""
        delay, away = INTERVAL, False
        while True:
            await asyncio.sleep(delay)
            try:
                await self._flush()
            except httpx.HTTPError as error:
                if not away:
                    log.warning(
                        "Prefect can't be reached (%s): runs go on, their history follows", type(error).__name__
                    )
                delay, away = min(max(delay * 2, 1.0), 15.0), True
            else:
                if away:
                    log.info("Prefect is back")
                delay, away = INTERVAL, False

    async def aclose(self, timeout: float) -> None:
        """Post what is left, for at most `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._flush()
        except (TimeoutError, httpx.HTTPError):
            log.warning("%d events were not shown to Prefect before the end", self.waiting)
        await self._client.aclose()

    async def _flush(self) -> None:
        while True:
            self._unspill()
            with self._lock:
                batch = [self._waiting.popitem(last=False) for _ in range(min(BATCH, len(self._waiting)))]
            if not batch:
                return
            try:
                await self._post(batch)
            except BaseException:
                with self._lock:
                    for key, body in reversed(batch):
                        if key not in self._waiting:  # else a newer word on the same run has come
                            self._waiting[key] = body
                            self._waiting.move_to_end(key, last=False)
                raise

    async def _post(self, batch: list[tuple[str, bytes]]) -> None:
        response = await self._client.post("/events", content=b"[" + b",".join(body for _, body in batch) + b"]")
        if response.status_code == 422 and len(batch) > 1:  # one event is refused: find it
            middle = len(batch) // 2
            await self._post(batch[:middle])
            await self._post(batch[middle:])
        elif response.status_code == 422:
            log.warning("Prefect refused an event: %s", response.text[:300])
        else:
            response.raise_for_status()


def _event(run: Told) -> dict[str, JSON]:
    """A state event as Prefect's engine would emit it. The server keeps the newest state of a run, by `occurred`."""
    kind, name, at = run.state.upper(), run.state.capitalize(), run.at.isoformat()
    shown: dict[str, JSON] = {
        "name": run.task,
        "task_key": run.task,
        "dynamic_key": f"{run.task}-{run.id}",
        "empirical_policy": {},
        "tags": [],
        "task_inputs": {name: [] for name in run.parameters},
        "run_count": run.attempts,
        "expected_start_time": run.due.isoformat(),
    }
    if run.state != "scheduled":
        start = run.started_at or run.at
        shown |= {"start_time": start.isoformat(), "end_time": at, "total_run_time": (run.at - start).total_seconds()}
    details: JSON = {"scheduled_time": run.due.isoformat()} if run.state == "scheduled" else {}
    return {
        "id": str(uuid7()),
        "occurred": at,
        "event": f"{_STATE}{name}",
        "resource": {
            "prefect.resource.id": f"{_STATE}{run.id}",
            "prefect.resource.name": run.task,
            "prefect.run-count": str(run.attempts),
            "prefect.state-message": run.message,
            "prefect.state-name": name,
            "prefect.state-timestamp": at,
            "prefect.state-type": kind,
            "prefect.orchestration": "client",
        },
        "related": [],
        "payload": {
            "intended": {"from": None, "to": kind},
            "initial_state": None,
            "validated_state": {
                "type": kind,
                "name": name,
                "message": run.message,
                "state_details": details,
                "data": None,
            },
            "task_run": shown,
        },
    }
