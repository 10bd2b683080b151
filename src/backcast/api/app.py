"""Builds the API from its routes and the given collaborators. Never imports prefect, marvin or users' code."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.types import ASGIApp

from backcast import __version__, console
from backcast.api import (
    access,
    again,
    attempts,
    auth,
    batches,
    compatibility,
    counts,
    docs,
    events,
    health,
    lanes,
    levers,
    logs,
    openapi,
    operations,
    origins,
    pools,
    problems,
    routing,
    runs,
    tasks,
    why,
    workers,
)
from backcast.api.body import LimitBody
from backcast.api.deps import Backend
from backcast.api.prefix import Prefix, of_links
from backcast.ledger.connection import Ledger
from backcast.process import tracing
from backcast.process.metrics import ApiMetrics
from backcast.settings import Api
from backcast.store import Store

_ABOUT = """Background tasks you can rely on. Submit a run, get its id at once, fetch the result when it is there.
Every error is a problem document (RFC 9457) whose `code` is stable and whose `detail` explains what to do.
JSON in which an object has a key twice is refused, as the two could mean different things."""


def _own_pages(app: ASGIApp) -> ASGIApp:
    return origins.OwnPages(app, origins=())


def create_app(ledger: Ledger, store: Store, limits: Api, metrics: ApiMetrics | None = None) -> FastAPI:
    """The API over these collaborators, which it closes at its end. It does not know its address."""
    metrics = metrics or ApiMetrics()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        reporting = asyncio.create_task(health.report(app.state.backend))
        yield
        app.state.backend.stop()
        reporting.cancel()
        await ledger.aclose()
        await store.aclose()
        await asyncio.to_thread(tracing.flush)

    app = FastAPI(
        title="backcast",
        version=__version__,
        description=_ABOUT,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,  # by docs.py
        telemetry={"tracing": False, "metrics": False, "logs": False},  # its spans have the path and the query
    )
    app.state.backend = Backend(ledger, store, limits, metrics)
    app.add_middleware(routing.EncodedPath)
    app.add_middleware(LimitBody, limit=limits.max_body, longer={batches.PATH: limits.max_batch_body})
    if limits.keys:
        app.add_middleware(auth.RequireKey, keys=limits.keys, read_keys=limits.read_keys)  # outside: no body is read
    else:
        app.add_middleware(origins.OwnPages, origins=limits.cors_origins)
    if "*" not in limits.allowed_hosts and (limits.allowed_hosts or not limits.keys):
        app.add_middleware(origins.OwnHosts, limits=limits)
    if limits.cors_origins:
        # Outside of both: a page may read refusals.
        app.add_middleware(origins.CrossOrigin, origins=limits.cors_origins)
    if limits.prefix:
        app.add_middleware(Prefix, prefix=limits.prefix)
    if tracing.is_on():
        app.add_middleware(access.TraceRequests)
    app.add_middleware(access.Observe, answered=metrics.answered)
    openapi.describe(app)
    problems.install(app)
    nouns = (
        tasks,
        runs,
        again,
        attempts,
        why,
        logs,
        operations,
        batches,
        events,
        counts,
        lanes,
        pools,
        workers,
        levers,
        health,
        problems,
        docs,
    )
    for router in (runs.hot, compatibility.router, *(noun.router for noun in nouns)):
        app.router.routes.extend(router.routes)  # `include_router` would match every request twice
    app.router.routes.append(docs.assets)
    # With keys too: its sessions are cookies, which a browser sends for every page.
    app.router.routes.extend(console.routes(app, limits, of_links.get, _own_pages, access.name))
    return app
