"""Refuses requests that a foreign web page may have sent: by the host that they name, and by the page's origin.

A browser lets every page send requests to this machine. Keys keep pages out, because a page has none; without keys,
these headers do, which a browser sets and a page can't change. Other clients do not send them, or send their own.
"""

import re
from collections.abc import Collection
from ipaddress import ip_address

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from backcast.api import problems
from backcast.errors import BackcastError, ForeignHost, ForeignOrigin
from backcast.settings import Api

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_AUTHORITY = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[^\s:/?#@\[\]\\]+?)\.?(?::(?P<port>\d{0,5}))?")
_SAFE = ("GET", "HEAD")


class CrossOrigin(CORSMiddleware):
    """Lets pages of these origins use the API: answers their preflights, and lets them read the answers."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("DELETE", "GET", "HEAD", "POST", "PUT"),
            allow_headers=("Authorization", "Content-Type", "Idempotency-Key", "Prefer"),
            allow_private_network=True,
            expose_headers=("Idempotent-Replayed", "Location", "Preference-Applied", "Retry-After"),
        )


class OwnHosts:
    """Middleware that answers 403 unless the request names one of our hosts: a page may have let a name of its own lead
    to our address (DNS rebinding)."""

    def __init__(self, app: ASGIApp, limits: Api) -> None:
        self._app = app
        self._names = {*_LOOPBACK, limits.host.lower(), *limits.allowed_hosts}
        self._suffixes = tuple(name[1:] for name in limits.allowed_hosts if name.startswith("*."))
        self._in_a_network = not _is_loopback(limits.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = _header(scope, b"host")
        if scope["type"] != "http" or self._is_ours(named):
            return await self._app(scope, receive, send)
        refusal = ForeignHost(
            f"The request is for the host {named!r}, which is not a name of this service: use localhost, or add the"
            " name to BACKCAST_API__ALLOWED_HOSTS."
        )
        return await problems.respond(refusal)(scope, receive, send)

    def _is_ours(self, named: str) -> bool:
        found = _AUTHORITY.fullmatch(named)
        host = found["host"].strip("[]") if found else ""
        if host in self._names or (self._suffixes and host.endswith(self._suffixes)):
            return True
        # In a network we can't know our names. No page has a name that is an address or has no dot.
        return bool(host) and self._in_a_network and ("." not in host or _is_address(host))


class OwnPages:
    """Middleware that answers 403 to requests from pages of other origins, unless they are allowed by `origins`."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            return await problems.respond(refusal)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> BackcastError | None:
        origin, site = _header(scope, b"origin"), _header(scope, b"sec-fetch-site")
        if origin:
            if origin in self._origins or _same(origin, _header(scope, b"host")):
                return None
            foreign = f"The page {origin} may not use this service"
        elif site in ("none", "same-origin"):
            return None
        elif not site:
            page = "/".join(_header(scope, b"referer").split("/")[:3])  # all that an old browser may send with a form
            if scope["method"] in _SAFE or page in ("", *self._origins) or _same(page, _header(scope, b"host")):
                return None
            foreign = f"The page {page} may not use this service"
        elif scope["method"] in _SAFE and _header(scope, b"sec-fetch-dest") == "document":
            return None  # a link to us: the page that has it can't read the answer
        else:
            foreign = "Another page may not use this service"
        return ForeignOrigin(f"{foreign}: add its origin to BACKCAST_API__CORS_ORIGINS, or set BACKCAST_API__KEYS.")


def _header(scope: Scope, name: bytes) -> str:
    """All its values: one that was sent twice is no name of ours."""
    values = [value.decode("latin-1").strip().lower() for key, value in scope.get("headers", ()) if key == name]
    return ", ".join(values)


def _same(origin: str, host: str) -> bool:
    """Whether the page came from that host, by a proxy's TLS too."""
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and _without_port(authority) == _without_port(host) != ""


def _without_port(authority: str) -> str:
    """Without the port if it is the usual one."""
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        return ""
    return found["host"] if found["port"] in (None, "", "80", "443") else f"{found['host']}:{found['port']}"


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host.lower() == "localhost" or (_is_address(host) and ip_address(host).is_loopback)
