"""The rules of every route: HEAD is answered like GET, a query parameter that the route does not take is refused, and a
name in the path may hold any character, `/` too (as `%2F`).
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes

from fastapi import params
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute
from starlette.convertors import Convertor, register_url_convertor
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from backcast import names
from backcast.api.access import SEEN
from backcast.errors import FieldError, InvalidInput

LABEL = "metadata."
"""A query parameter of this prefix filters by a label of the caller's own."""


class Route(APIRoute):
    takes_labels = False

    def __init__(self, path: str, endpoint: Callable[..., Any], **declared: Any) -> None:
        super().__init__(path, endpoint, **declared)
        taken = get_flat_params(self.dependant)
        self._queries = frozenset(field.alias for field in taken if isinstance(field.field_info, params.Query))
        self._gets = "GET" in (self.methods or ())

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is Match.PARTIAL and scope["method"] == "HEAD" and self._gets:
            match = Match.FULL
        return match, child

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (seen := scope.get(SEEN)) is not None:
            seen.route, seen.run = self.path_format, scope["path_params"].get("run_id")
        if scope["query_string"]:
            self._check(scope["query_string"])
        if scope["method"] == "HEAD" and self._gets:
            # A copy: by its own scope the server knows to send no body.
            scope = {**scope, "method": "GET", "is_head": True}
        await super().handle(scope, receive, send)

    def _check(self, query: bytes) -> None:
        """Raises `InvalidInput`: a filter that is misspelt, or given twice, must not be ignored."""
        try:
            asked = parse_qsl(query.decode(), keep_blank_values=True, errors="strict")
        except UnicodeDecodeError:
            why = "a query is UTF-8, percent-encoded"
            raise InvalidInput(f"query: {why}.", errors=(FieldError("query", why),)) from None
        given = [name for name, _ in asked]
        for name in given:
            if name not in self._queries and not (self.takes_labels and name.startswith(LABEL)):
                known = f"it takes {', '.join(sorted(self._queries))}" if self._queries else "it takes none"
                why = f"this route does not take this query parameter; {known}"
            elif given.count(name) > 1:
                why = "it is given more than once"
            else:
                continue
            raise InvalidInput(f"query/{name}: {why}.", errors=(FieldError(f"query/{name}", why),))


class LabelledRoute(Route):
    takes_labels = True


class _Name(Convertor[str]):
    """`{name:name}` in the path of a route; raises `InvalidInput`."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        try:
            return names.check(unquote(value, errors="strict"))
        except ValueError as error:  # UnicodeDecodeError is one
            why = names.RULE if not isinstance(error, UnicodeDecodeError) else "a name is UTF-8, percent-encoded"
            raise InvalidInput(f"path/name: {why}.", errors=(FieldError("path/name", why),)) from None

    def to_string(self, value: str) -> str:
        return quote(value, safe="")


class _Run(Convertor[str]):
    """`{run_id:run}` at the end of a path: anything but the verbs that have routes of their own in its place."""

    regex = "(?!(?:retry|cancel)$)[^/]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("name", _Name())
register_url_convertor("run", _Run())


class EncodedPath:
    """Middleware that gives routes the path as it was sent, in which an encoded `/` is not yet a separator. Other
    characters are encoded in one way, so that every spelling of a path finds its route."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and b"%" in (raw := scope["raw_path"]):
            path = "/".join(quote(unquote_to_bytes(segment), safe="") for segment in raw.split(b"/"))
            scope = {**scope, "path": path}
        await self._app(scope, receive, send)
