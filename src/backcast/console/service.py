"""The console as a user of the API: it calls the API's own application, with the key of whoever has signed in.

So every right, check and problem document is the API's. No call leaves the process.
"""

from collections.abc import Mapping

import httpx
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from backcast.client import AsyncClient, authorization

_HOST = "localhost"
"""A name of its own for every API."""
_KEPT = ("type", "asgi", "http_version", "method", "scheme", "server", "client", "extensions", "abort")
"""Parts of a request's scope that do not depend on its path. `abort` is of `api/server.py`."""
_PASSED = (b"last-event-id", b"accept", b"range")


class Service:
    """The API, as the holder of `key` may use it; None where no keys are set."""

    def __init__(self, api: ASGIApp, key: str | None) -> None:
        self._api, self._headers = api, authorization(key)
        self.client = AsyncClient(
            f"http://{_HOST}",
            headers=self._headers,
            patience=0.0,  # a person looks again sooner than a retry would
            transport=httpx.ASGITransport(api, raise_app_exceptions=False),
        )

    def answer(self, path: str, query: str = "") -> Response:
        """The API's own answer to GET `path`, streams included, for the browser."""
        return _Passed(self._api, path, query, self._headers)


class _Passed(Response):
    def __init__(self, api: ASGIApp, path: str, query: str, headers: Mapping[str, str]) -> None:
        super().__init__()
        self._api, self._path, self._query, self._given = api, path, query, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"host", _HOST.encode()), *(each for each in scope["headers"] if each[0] in _PASSED)]
        headers += [(name.lower().encode(), value.encode()) for name, value in self._given.items()]
        asked = {part: scope[part] for part in _KEPT if part in scope}
        where = {"path": self._path, "raw_path": self._path.encode(), "root_path": ""}
        where["query_string"] = self._query.encode()
        await self._api({**asked, **where, "headers": headers}, receive, send)
