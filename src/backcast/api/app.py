"""The API process: puts the routes over the collaborators it is given. Never imports prefect, marvin or users' code."""

import contextlib
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI

from backcast import __version__
from backcast.api import auth, batches, compatibility, health, lanes, problems, runs, tasks
from backcast.api.body import LimitBody
from backcast.api.deps import Backend
from backcast.ledger.connection import Ledger
from backcast.process import configure_logging
from backcast.settings import Api, Settings
from backcast.store import Store, open_store

_ABOUT = """Background tasks you can rely on. Submit a run, get its id at once, fetch the result when it is there.
Every error is a problem document (RFC 9457) whose `code` is stable and whose `detail` says what to do."""


def create_app(ledger: Ledger, store: Store, limits: Api) -> FastAPI:
    """The API over these collaborators, which it closes when it ends; where it listens is not its business."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await ledger.aclose()
        await store.aclose()

    app = FastAPI(title="backcast", version=__version__, description=_ABOUT, lifespan=lifespan, redirect_slashes=False)
    app.state.backend = Backend(ledger, store, limits)
    app.add_middleware(LimitBody, limit=limits.max_body, longer={batches.PATH: limits.max_batch_body})
    if limits.keys:
        app.add_middleware(auth.RequireKey, keys=limits.keys)  # the outermost: nothing of a stranger is read
    auth.describe(app)
    problems.install(app)
    nouns = (tasks.router, runs.router, batches.router, lanes.router, health.router, problems.router)
    for router in (runs.hot, compatibility.router, *nouns):
        app.router.routes.extend(router.routes)  # `include_router` would match every request twice
    return app


def serve(settings: Settings) -> None:
    """Serve the API until SIGTERM or SIGINT; requests that are being answered are finished first."""
    configure_logging(settings.log_level)
    database = settings.database
    ledger = Ledger(database.url.get_secret_value(), pool=database.pool, name="backcast-api", timeout=database.timeout)
    app = create_app(ledger, open_store(settings.store), settings.api)
    uvicorn.run(
        app,
        host=settings.api.host,
        port=settings.api.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # nothing here depends on who asks or by which scheme
        timeout_graceful_shutdown=10,
        timeout_keep_alive=75,  # longer than a proxy's usual 60 s: it must be the one to close an idle connection
        server_header=False,
    )
