"""Serves the probes and metrics of a process on one port."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from backcast.errors import ConfigurationError, Unavailable


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
    server = _Server(config)
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise ConfigurationError(f"Port {port} on {host} is taken: set {setting} to another one.") from None
    serving = asyncio.create_task(server.serve(sockets=[socket]))
    try:
        yield socket.getsockname()[1]
    finally:
        server.should_exit = True
        await serving
        socket.close()
