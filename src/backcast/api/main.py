"""The API process: builds the API's collaborators from the settings, and serves until a signal."""

import contextlib
import socket
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE

from backcast.api.app import create_app
from backcast.ledger.connection import Ledger
from backcast.process.logs import configure_logging
from backcast.settings import Settings
from backcast.store import open_store


class _Server(uvicorn.Server):
    """uvicorn, which at a stop answers the requests that wait for a run before it waits for all requests to end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.backend.waits.stop()
        await super().shutdown(sockets)


def main(settings: Settings) -> None:
    """Serve the API until SIGTERM or SIGINT; requests that are being answered are finished first."""
    configure_logging(settings.log_level)
    ledger = Ledger.of(settings.database, name="backcast-api")
    app = create_app(ledger, open_store(settings.store), settings.api)
    config = uvicorn.Config(
        app,
        host=settings.api.host,
        port=settings.api.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # nothing here depends on the client's address or the scheme
        timeout_graceful_shutdown=10,
        timeout_keep_alive=75,  # longer than a proxy's usual 60 s: it must be the one to close an idle connection
        server_header=False,
    )
    server = _Server(config, app)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(STARTUP_FAILURE)
