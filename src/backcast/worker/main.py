"""The worker process: builds the worker's collaborators from the settings, and works until a signal."""

import asyncio
import logging
import os
import threading

import uvloop
from prometheus_client import Gauge

from backcast.ledger.connection import Ledger
from backcast.process import Stop, configure_logging, probes
from backcast.settings import Settings
from backcast.store import open_store
from backcast.worker.loop import Worker


async def _serve(settings: Settings) -> None:
    # The one late import: Prefect reads its settings when it is imported, and ours must be there first.
    from backcast import llm
    from backcast.executor import capture, registry
    from backcast.executor.executor import Engine
    from backcast.history.sink import Mirror

    stop = Stop()
    store = open_store(settings.store)
    database = settings.database
    ledger = Ledger(
        database.url.get_secret_value(), pool=database.pool, name="backcast-worker", timeout=database.timeout
    )
    mirror = Mirror(settings.prefect)
    capture.install(mirror)
    llm.connect(settings.model)
    tasks = registry.discover([*(["backcast.llm.tasks"] if settings.builtin_tasks else []), *settings.tasks])
    engine = Engine(
        tasks,
        pool=settings.worker.pool,
        max_attempts=settings.max_attempts,
        store=store,
        threads=settings.worker.slots,
        tell=mirror.show if mirror.is_enabled else None,
    )
    mirroring = asyncio.create_task(mirror.run())
    try:
        async with engine:
            worker = Worker(settings, ledger, store, engine, llm.metered)
            Gauge(
                "backcast_worker_history_waiting", "Events not yet shown to Prefect", registry=worker.registry
            ).set_function(lambda: mirror.waiting)
            async with probes(settings.worker.host, settings.worker.port, ready=worker.check, registry=worker.registry):
                await worker.run(stop)
    finally:
        mirroring.cancel()
        await asyncio.gather(mirroring, return_exceptions=True)
        await llm.aclose()
        await mirror.aclose(timeout=2)
        await ledger.aclose()
        await store.aclose()


def main(settings: Settings) -> None:
    """Run a worker until SIGTERM or SIGINT."""
    configure_logging(settings.log_level)
    os.environ.update(settings.prefect.environment())
    uvloop.run(_serve(settings))
    # Everything is settled. A sync task that ignores being handed back must not keep the process.
    if any(thread.name.startswith("task") for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(0)
