"""The API process: builds the API's collaborators from the settings, and serves until a signal."""

import asyncio
import contextlib
import gc
import sys
from functools import partial

from uvicorn.config import STARTUP_FAILURE

from backcast.api import health, server
from backcast.api.app import create_app
from backcast.errors import LedgerUnavailable
from backcast.ledger.connection import Ledger
from backcast.process import tracing
from backcast.process.logs import configure_logging
from backcast.process.metrics import ApiMetrics
from backcast.process.probes import probes
from backcast.settings import Settings
from backcast.store import open_store

VERIFY = 3.0
"""Seconds to find out at the start that the database can't be used as it is reached."""


def main(settings: Settings) -> None:
    """Serve the API until SIGTERM or SIGINT; requests that are being answered are finished first."""
    configure_logging(settings.log_level, settings.log_format)
    tracing.start(settings.tracing, "api")
    ledger = Ledger.of(settings.database, name="backcast-api")
    with contextlib.suppress(LedgerUnavailable, TimeoutError):  # a database that is away may come later
        asyncio.run(asyncio.wait_for(ledger.verify(), VERIFY))
    metrics = ApiMetrics()
    app = create_app(ledger, open_store(settings.store, metrics.stored), settings.api, metrics)
    config = server.config(
        app,
        settings.api,
        host=settings.api.host,
        port=settings.api.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # nothing here depends on the client's address or the scheme
        timeout_graceful_shutdown=10,
        timeout_keep_alive=75,  # longer than a proxy's usual 60 s: it must be the one to close an idle connection
        server_header=False,
    )
    beside = probes(
        settings.api.metrics_host,
        settings.api.metrics_port,
        setting="BACKCAST_API__METRICS_PORT",
        ready=partial(health.check, app.state.backend),
        registry=metrics.registry,
    )
    serving = server.Server(config, app, beside)
    gc.freeze()  # what has been imported is never garbage, and no collection needs to walk it
    with contextlib.suppress(KeyboardInterrupt):
        serving.run()
    if not serving.started:
        sys.exit(STARTUP_FAILURE)
