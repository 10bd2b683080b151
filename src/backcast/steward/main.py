"""The steward process: builds the steward's collaborators from the settings, and works until a signal."""

import asyncio
import contextlib

from backcast.history.sink import Mirror
from backcast.ledger.connection import Ledger
from backcast.process import Stop, configure_logging, probes
from backcast.settings import Settings
from backcast.steward.loop import Steward
from backcast.store import open_store


async def _serve(settings: Settings) -> None:
    stop = Stop()
    # Connections for the leader's duties, which run side by side.
    url, timeout = settings.database.url.get_secret_value(), settings.database.timeout
    ledger = Ledger(url, pool=5, name="backcast-steward", timeout=timeout)
    store = open_store(settings.store)
    mirror = Mirror(settings.prefect)
    steward = Steward(settings, ledger, store, mirror)
    async with probes(settings.steward.host, settings.steward.port, ready=steward.check, registry=steward.registry):
        running, mirroring = asyncio.create_task(steward.run()), asyncio.create_task(mirror.run())
        asked = asyncio.create_task(stop.asked.wait())
        await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
        for task in (asked, mirroring, running):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    await mirror.aclose(timeout=2)
    await ledger.aclose()
    await store.aclose()


def main(settings: Settings) -> None:
    """Run a steward until SIGTERM or SIGINT."""
    configure_logging(settings.log_level)
    asyncio.run(_serve(settings))
