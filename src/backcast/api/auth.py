"""Lets a request in if it carries one of the keys, or if no keys are set. A key allows everything, a read key allows a
look at everything.
"""

import hashlib
import hmac
from collections.abc import Iterable

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from backcast.api import problems
from backcast.api.access import SEEN
from backcast.errors import ReadOnlyKey, Unauthorized

OPEN = ("/livez", "/readyz", "/docs", "/openapi.json", "/problems", "/console")
"""Paths that need no key: for probes, and for people who have none yet. The console has a door of its own."""
READING = ("GET", "HEAD")


def is_open(path: str) -> bool:
    return path == "/" or any(path == place or path.startswith(f"{place}/") for place in OPEN)


class RequireKey:
    """Middleware that answers 401 unless the request carries `Authorization: Bearer KEY` with a key of ours, and 403 if
    it would change something and the key is one of `read_keys`."""

    def __init__(self, app: ASGIApp, keys: Iterable[SecretStr], read_keys: Iterable[SecretStr]) -> None:
        self._app = app
        self._keys = [_digest(key.get_secret_value().encode()) for key in keys]
        self._read_keys = [_digest(key.get_secret_value().encode()) for key in read_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]) or not (refusal := self._refusal(scope)):
            return await self._app(scope, receive, send)
        return await problems.respond(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Unauthorized | ReadOnlyKey | None:
        kind, _, shown = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = _digest(shown.strip())
        # Every key is compared, in a time that reveals nothing about any of them.
        may_change, may_read = [
            (kind.lower() == b"bearer") & (sum(hmac.compare_digest(digest, key) for key in keys) > 0)
            for keys in (self._keys, self._read_keys)
        ]
        if not (may_change or may_read):
            return Unauthorized("Send a key of this service as `Authorization: Bearer KEY`.")
        if (seen := scope.get(SEEN)) is not None:
            seen.key = digest.hex()[:8]
        if may_change or scope["method"] in READING:
            return None
        return ReadOnlyKey("This key may look at everything and change nothing: use one of BACKCAST_API__KEYS.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
