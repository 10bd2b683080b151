"""The steward process: builds the steward's collaborators from the settings, and runs it until a signal."""

import asyncio
from functools import partial

from backcast.history.sink import Sink
from backcast.ledger import cursors
from backcast.ledger.connection import Ledger
from backcast.process import background
from backcast.process.logs import configure_logging
from backcast.process.metrics import StewardMetrics
from backcast.process.probes import probes
from backcast.process.stop import Stop
from backcast.settings import Settings
from backcast.steward.loop import Steward
from backcast.store import open_store


async def _serve(settings: Settings) -> None:
    stop = Stop()
    ledger = Ledger.of(settings.database, name="backcast-steward", pool=5)  # the leader's duties run side by side
    metrics = StewardMetrics()
    store = open_store(settings.store, metrics.stored)
    sink = Sink(settings.prefect, metrics.history_dropped)
    metrics.show_history(lambda: [sink.figures])
    steward = Steward(settings, ledger, store, sink, metrics)
    async with probes(
        settings.steward.host,
        settings.steward.port,
        setting="BACKCAST_STEWARD__PORT",
        ready=steward.check,
        registry=metrics.registry,
    ):
        identify = partial(cursors.identity, ledger)
        running, publishing = (
            asyncio.create_task(background.keep("lead or stand by", steward.run)),
            asyncio.create_task(background.keep("publish history", partial(sink.run, identify))),
        )
        asked = asyncio.create_task(stop.asked.wait())
        await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
        for task in (asked, publishing, running):
            task.cancel()
        await asyncio.gather(asked, publishing, running, return_exceptions=True)  # a post may put back what it has
        if not running.cancelled():
            running.result()
    await sink.aclose(timeout=2)
    await ledger.aclose()
    await store.aclose()


def main(settings: Settings) -> None:
    """Run a steward until SIGTERM or SIGINT."""
    configure_logging(settings.log_level, settings.log_format)
    asyncio.run(_serve(settings))
