"""Serves the probes and metrics of a process on a port of its own."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from backcast.errors import ConfigurationError, Unavailable
from backcast.process import background

log = logging.getLogger("backcast.process")


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: this process has its own way to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def probes(
    host: str, port: int, *, setting: str, ready: Callable[[], Awaitable[None]], registry: CollectorRegistry
) -> AsyncIterator[int]:
    """Serve /livez, /readyz and /metrics while entered; yields the port. `ready` raises `Unavailable` if not ready."""

    async def livez(_: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(_: Request) -> Response:
        try:
            await ready()
        except Unavailable as error:
            return JSONResponse({"status": "unavailable", "code": error.code, "detail": error.detail}, 503)
        return JSONResponse({"status": "ready"})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app = Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", metrics)])
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, lifespan="off")
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise ConfigurationError(f"Port {port} on {host} is taken: set {setting} to another one.") from None
    servers: list[_Server] = []

    async def serve() -> None:
        servers.append(_Server(config))
        await servers[-1].serve(sockets=[socket.dup()])
        if not servers[-1].should_exit:
            raise RuntimeError("the server has ended by itself")

    if port == 0:
        log.info("probes and metrics are on port %d", socket.getsockname()[1])
    serving = asyncio.create_task(background.keep("serve the probes", serve))
    try:
        yield socket.getsockname()[1]
    finally:
        if servers:
            servers[-1].should_exit = True
        await asyncio.wait({serving}, timeout=1)
        serving.cancel()
        socket.close()
