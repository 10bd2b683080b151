"""Observes each request: what was asked, how it was answered, how long that took. Metrics count it; the log has
one line about it, and traces have a span, but for health checks. A request that another one makes in the process, as
a page of the console does, has no line of its own.
"""

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backcast.process import tracing

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
    trace: str | None = None


_outer: ContextVar[Seen | None] = ContextVar("backcast_outer_request", default=None)
"""What is known of the request whose answer is being made."""


class Observe:
    """Middleware, outside of all others. `answered` is called with method, route, status and seconds; a caller who has
    gone away gets the status 0."""

    def __init__(self, app: ASGIApp, answered: Callable[[str, str, int, float], object]) -> None:
        self._app, self._answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        outer, seen = _outer.get(), Seen()
        scope[SEEN] = seen
        token = _outer.set(seen)
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
            seconds, method, route = time.perf_counter() - began, scope["method"], seen.route or "(no route)"
            self._answered(method, route, status, seconds)
            _outer.reset(token)
            if outer is not None:
                outer.key = outer.key or seen.key
                if method not in ("GET", "HEAD"):
                    outer.run = outer.run or seen.run
            elif route not in _QUIET and log.isEnabledFor(logging.INFO):
                ms = round(seconds * 1000, 1)
                fields = {"method": method, "route": route, "status": status, "ms": ms, "key": seen.key}
                more = {"run": seen.run, "trace": seen.trace}
                log.info("%s %s %d", method, route, status, extra={"fields": fields | more})


def name(scope: Scope, route: str) -> None:
    """Give the request of `scope` the name that metrics, log and trace have for it."""
    if (seen := scope.get(SEEN)) is not None:
        seen.route = route
        if (run := scope.get("path_params", {}).get("run_id")) is not None:
            seen.run = str(run)


class TraceRequests:
    """Middleware, inside of `Observe`: makes a request a span, in its caller's trace if there is one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].endswith(tuple(_QUIET)):
            await self._app(scope, receive, send)
            return
        seen = scope.setdefault(SEEN, Seen())
        with tracing.request(Headers(scope=scope)) as span:
            seen.trace = tracing.trace_id()

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            await self._app(scope, receive, watched)
            span.update_name(f"{scope['method']} {seen.route or '(no route)'}")
            span.set_attribute("http.request.method", scope["method"])
            for name, value in (("http.route", seen.route), ("backcast.run", seen.run)):
                if value is not None:
                    span.set_attribute(name, value)
