"""Composes the console: its routes, the door that only people with a key pass, and what holds for every answer."""

from collections.abc import Callable, Mapping
from http.cookies import SimpleCookie

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backcast.console import batches, fleet, many, overview, runs, sign_in, tasks, try_it
from backcast.console.pages import STATIC, Prefixed, query, render
from backcast.console.service import Service
from backcast.console.session import COOKIE, Sessions
from backcast.errors import BackcastError, NotFound
from backcast.settings import Api

PATH = "/console"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_OPEN = ("/login", f"/{STATIC}/")


def routes(
    api: ASGIApp,
    limits: Api,
    prefix: Prefixed,
    guard: Callable[[ASGIApp], ASGIApp],
    name: Callable[[Scope, str], None],
) -> list[BaseRoute]:
    """The routes to add to `api`, which the console calls in its turn. `guard` keeps foreign pages out; `name` is given
    the route of each request, which is in the log."""
    sessions = Sessions(limits.keys, limits.read_keys)
    modules = (overview, try_it, runs, many, tasks, fleet, batches, sign_in)
    found = [route for module in modules for route in module.routes]
    names = {route.endpoint: route.path for route in found}
    pages = Starlette(
        routes=[
            *found,
            Mount(f"/{STATIC}", StaticFiles(packages=[("backcast.console", STATIC)])),
        ],
        exception_handlers={BackcastError: _refused, HTTPException: _http, Exception: _failed},
    )
    pages.state.sessions, pages.state.prefect_ui = sessions, limits.prefect_ui
    console = guard(_Named(_Headers(_Door(pages, api, sessions, prefix)), names, name))

    async def home(request: Request) -> Response:
        """A person is led to the page where something can be tried; a program gets the 404 that it ever got."""
        if "text/html" not in request.headers.get("accept", ""):
            raise NotFound("There is nothing at /: see /docs.")
        return RedirectResponse(f"{PATH}/try", 303, {"Vary": "Accept"})

    async def enter(_: Request) -> Response:
        return RedirectResponse(f"{PATH}/", 303)

    return [Route("/", home), Route(PATH, enter), Mount(PATH, console)]


class _Named:
    """Middleware that gives each request the name of its route, never its path."""

    def __init__(self, app: ASGIApp, names: Mapping[object, str], name: Callable[[Scope, str], None]) -> None:
        self._app, self._names, self._name = app, names, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            self._name(scope, PATH + self._names.get(scope.get("endpoint"), ""))


class _Door:
    """Middleware that gives each request the API as its sender may use it, and leads those to the page for signing in
    who have to."""

    def __init__(self, app: ASGIApp, api: ASGIApp, sessions: Sessions, prefix: Prefixed) -> None:
        self._app, self._sessions, self._prefix = app, sessions, prefix
        self._api = api
        self._services = dict[str | None, Service]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        key = self._sessions.key(_cookie(request))
        may_enter = key is not None or not self._sessions.are_needed
        if may_enter and key not in self._services:
            self._services[key] = Service(self._api, key)
        state = request.state
        state.service = self._services[key] if may_enter else None
        state.may_change = self._sessions.may_change(key)  # the API decides: this hides what it would refuse
        state.has_keys = self._sessions.are_needed
        state.prefix = self._prefix()  # now: a call of the API in between has a prefix of its own
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if may_enter or path.startswith(_OPEN):
            return await self._app(scope, receive, send)
        if request.method in ("GET", "HEAD") and request.headers.get("sec-fetch-site") == "cross-site":
            # A link elsewhere led here, so the browser has kept the cookie back; it sends it when the page asks again.
            return await render(request, "again.html")(scope, receive, send)
        place = path if request.method == "GET" else "/"
        answer = RedirectResponse(f"{PATH}/login{query(to=place if place != '/' else None)}", 303)
        if "hx-request" in request.headers:  # a part of an old page: the whole page has to go there
            answer = Response(status_code=204, headers={"HX-Refresh": "true"})
        return await answer(scope, receive, send)


def _cookie(request: Request) -> str | None:
    try:
        found = SimpleCookie(request.headers.get("cookie", "")).get(COOKIE)
    except Exception:  # noqa: BLE001  # it is the caller's text: CookieError and others
        return None
    return found.value if found else None


class _Headers:
    """Middleware that adds to every answer what a browser may do with it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_static = scope["path"].removeprefix(scope.get("root_path", "")).startswith(f"/{STATIC}/")

        async def limited(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
                if not is_static:
                    headers["Cache-Control"] = "no-store"
                elif message["status"] == 200 and scope["query_string"]:  # it has a version
                    headers["Cache-Control"] = "public, max-age=31536000, immutable"
            await send(message)

        await self._app(scope, receive, limited)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, BackcastError)
    return render(request, "error.html", error.status, title=error.title, detail=error.detail, code=error.code)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = "There is no such page" if error.status_code == 404 else "The request can't be used"
    return render(request, "error.html", error.status_code, title=title, detail=error.detail, code="not_found")


async def _failed(request: Request, _: Exception) -> Response:
    title, detail = BackcastError.title, "Please report this; the log of the API has the details."
    return render(request, "error.html", 500, title=title, detail=detail, code=BackcastError.code)
