"""The worker process: builds the worker from the settings, and runs it until a signal."""

import asyncio
import logging
import os
import threading
from functools import partial

import uvloop

from backcast.ledger import cursors
from backcast.ledger.connection import Ledger
from backcast.process import background
from backcast.process.logs import configure_logging
from backcast.process.probes import probes
from backcast.process.stop import Stop
from backcast.settings import Settings
from backcast.store import open_store
from backcast.worker.loop import Worker


async def _serve(settings: Settings) -> None:
    # Imported late: Prefect reads its settings when it is imported, and ours must be there first.
    from backcast import llm
    from backcast.executor import capture, registry
    from backcast.executor.executor import Executor
    from backcast.history.sink import Sink

    store = open_store(settings.store)
    ledger = Ledger.of(settings.database, name="backcast-worker")
    sink = Sink(settings.prefect)
    capture.install(sink)
    llm.connect(settings.model)
    tasks = registry.discover([*(["backcast.llm.tasks"] if settings.builtin_tasks else []), *settings.tasks])
    executor = Executor(
        tasks,
        pool=settings.worker.pool,
        max_attempts=settings.max_attempts,
        store=store,
        threads=settings.worker.slots,
        publish=sink.publish if sink.is_enabled else None,
    )
    stop = Stop()  # not before the tasks are imported: until then a signal ends the process at once
    publish = partial(sink.run, partial(cursors.identity, ledger))
    publishing = asyncio.create_task(background.keep("publish history", publish))
    try:
        async with executor:
            worker = Worker(settings, ledger, store, executor, llm.metered)
            sink.measure(worker.registry)
            async with probes(
                settings.worker.host,
                settings.worker.port,
                setting="BACKCAST_WORKER__PORT",
                ready=worker.check,
                registry=worker.registry,
            ):
                await worker.run(stop)
    finally:
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        await llm.aclose()
        await sink.aclose(timeout=2)
        await ledger.aclose()
        await store.aclose()


def main(settings: Settings) -> None:
    """Run a worker until SIGTERM or SIGINT."""
    configure_logging(settings.log_level)
    os.environ.update(settings.prefect.environment())
    uvloop.run(_serve(settings))
    # Everything is settled. A sync task that ignores its release must not keep the process.
    if any(thread.name.startswith("task") for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(0)
