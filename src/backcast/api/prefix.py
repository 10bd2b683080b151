"""Serves the API below a prefix too, as behind an Ingress that shares its host: links then begin with it as well.

Requests without the prefix are answered as ever: probes and callers inside a cluster do not come through the Ingress.
"""

from contextvars import ContextVar

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

of_links: ContextVar[str] = ContextVar("backcast_prefix_of_links", default="")
"""The prefix of links in the answer to the present request; empty if the request came without it."""


class Prefix:
    """Middleware: all inside of it see paths without the prefix."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        below = scope["type"] == "http" and f"{path}/".startswith(f"{self._prefix}/")
        of_links.set(self._prefix if below else "")
        if not below:
            return await self._app(scope, receive, send)
        raw = scope["raw_path"].removeprefix(self._prefix.encode())
        scope = {**scope, "path": path.removeprefix(self._prefix) or "/", "raw_path": raw or b"/"}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("Location", "").startswith("/"):
                    headers["Location"] = self._prefix + headers["Location"]
            await send(message)

        return await self._app(scope, receive, answer)
