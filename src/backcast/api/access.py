"""Logs one line a request: what was asked, how it was answered, how long that took. Health checks are left out."""

import logging
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("backcast.access")

SEEN = "backcast.seen"
"""In the scope of a request: the `Seen` that routes and keys fill in."""
_QUIET = frozenset(("/livez", "/readyz", "/metrics"))
_RUN = b"/v1/runs/"


@dataclass(slots=True)
class Seen:
    """What is known of a request, once its route has been found. Never its path: names may be the caller's data."""

    route: str | None = None
    run: str | None = None
    key: str | None = None
    """The first digits of the key's digest."""


class LogRequests:
    """Middleware, outside of all others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not log.isEnabledFor(logging.INFO):
            return await self._app(scope, receive, send)
        seen = scope[SEEN] = Seen()
        status, began = 0, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                for name, value in message["headers"] if seen.run is None else ():
                    if name == b"location" and value.startswith(_RUN):
                        seen.run = value[len(_RUN) :].decode()
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if seen.route not in _QUIET:
                ms = round((time.perf_counter() - began) * 1000, 1)
                method, route = scope["method"], seen.route or "(no route)"
                fields = {"method": method, "route": route, "status": status, "ms": ms, "key": seen.key}
                log.info("%s %s %d", method, route, status, extra={"fields": {**fields, "run": seen.run}})
