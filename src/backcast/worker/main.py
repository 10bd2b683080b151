"""The worker process, a supervisor: it claims, stores and settles, and runs no code of a user. Its executors do."""

import asyncio
import contextlib
import gc
from importlib.util import find_spec

import uvloop

from backcast.errors import Unavailable
from backcast.ledger import cursors
from backcast.ledger.connection import Ledger
from backcast.models import uuid7
from backcast.process import background, orphans, privacy, tracing
from backcast.process.logs import configure_logging
from backcast.process.metrics import WorkerMetrics
from backcast.process.probes import probes
from backcast.process.stop import Stop
from backcast.settings import Settings
from backcast.store import open_store
from backcast.worker.executors import Executors
from backcast.worker.loop import Worker


async def _serve(settings: Settings) -> None:
    stop = Stop(lambda senders: executors.refuse(senders))
    metrics = WorkerMetrics()
    store = open_store(settings.store, metrics.stored)
    # One for claims and one for settlements; with those for heartbeats and for notifications, four.
    ledger = Ledger.of(settings.database, name="backcast-worker", pool=2)
    worker_id = uuid7()
    configure_logging(settings.log_level, settings.log_format, worker=worker_id)
    tracing.start(settings.tracing, "worker")
    executors = Executors(settings, store, metrics, worker_id)
    worker: Worker | None = None

    async def ready() -> None:
        if worker is None:
            raise Unavailable("The tasks are being imported.")
        await worker.check()

    async def identify() -> None:
        executors.identity = await cursors.identity(ledger)

    others = [
        asyncio.create_task(executors.run()),
        asyncio.create_task(background.keep("learn the identity of the ledger", identify)),
    ]
    try:
        host, port = settings.worker.host, settings.worker.port
        async with probes(host, port, setting="BACKCAST_WORKER__PORT", ready=ready, registry=metrics.registry):
            if await _started(executors, stop):
                gc.freeze()  # what has been imported is never garbage, and no collection needs to walk it
                worker = Worker(settings, ledger, store, executors, metrics, worker_id)
                await worker.run(stop)
    finally:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await executors.aclose(by=worker and worker.ends_at)
        await ledger.aclose()
        await store.aclose()
        await asyncio.to_thread(tracing.flush)


async def _started(executors: Executors, stop: Stop) -> bool:
    """Wait for the first executor; false when the process is to end before."""
    asked = asyncio.create_task(stop.asked.wait())
    try:
        while not executors.is_ready:
            executors.changed.clear()
            changed = asyncio.create_task(executors.changed.wait())
            await asyncio.wait({asked, changed, executors.failed}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if executors.failed.done():
                executors.failed.result()
            if asked.done():
                return False
        return True
    finally:
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked


def main(settings: Settings) -> None:
    """Run a worker until SIGTERM or SIGINT."""
    if find_spec("prefect") is None:  # its executors would fail one after the other
        raise ModuleNotFoundError("No module named 'prefect'", name="prefect")
    privacy.hide()
    orphans.adopt()
    uvloop.run(_serve(settings))
