"""Lets a request in if it carries one of the keys, or if no keys are set. Every key allows everything."""

import hashlib
import hmac
from collections.abc import Iterable

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from backcast.api import problems
from backcast.api.access import SEEN
from backcast.errors import Unauthorized

OPEN = ("/livez", "/readyz", "/docs", "/openapi.json", "/problems", "/console")
"""Paths that need no key: for probes, and for people who have none yet. The console has a door of its own."""


def is_open(path: str) -> bool:
    return path == "/" or any(path == place or path.startswith(f"{place}/") for place in OPEN)


class RequireKey:
    """Middleware that answers 401 unless the request carries `Authorization: Bearer KEY` with a key of ours."""

    def __init__(self, app: ASGIApp, keys: Iterable[SecretStr]) -> None:
        self._app = app
        self._keys = [_digest(key.get_secret_value().encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]) or self._is_known(scope):
            return await self._app(scope, receive, send)
        refusal = Unauthorized("Send a key of this service as `Authorization: Bearer KEY`.")
        return await problems.respond(refusal)(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        kind, _, shown = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = _digest(shown.strip())
        # Every key is compared, in a time that reveals nothing about any of them.
        is_known = (kind.lower() == b"bearer") & (sum(hmac.compare_digest(digest, key) for key in self._keys) > 0)
        if is_known and (seen := scope.get(SEEN)) is not None:
            seen.key = digest.hex()[:8]
        return is_known


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
