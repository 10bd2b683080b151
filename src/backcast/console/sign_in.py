"""Signing in with a key of the API, and out."""

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from backcast.console.pages import read_form, render
from backcast.console.session import COOKIE, LIFE, Sessions


async def _ask(request: Request) -> Response:
    if request.state.service is not None:
        return RedirectResponse("/console/", 303)
    return render(request, "login.html", to=_place(request.query_params.get("to")), wrong=False)


async def _open(request: Request) -> Response:
    sessions: Sessions = request.app.state.sessions
    form = await read_form(request)
    place = _place(form.get("to"))
    value = sessions.open(str(form.get("key", "")))
    if value is None:
        return render(request, "login.html", 401, to=place, wrong=True)
    answer = RedirectResponse(f"/console{place}", 303)
    is_safe = "https" in (
        request.url.scheme,
        request.headers.get("origin", "").partition(":")[0],  # as the browser sees us, with TLS at a proxy
        request.headers.get("x-forwarded-proto"),
    )
    path = f"{request.state.prefix}/console"
    answer.set_cookie(
        COOKIE, value, int(LIFE.total_seconds()), path=path, secure=is_safe, httponly=True, samesite="strict"
    )
    return answer


async def _close(request: Request) -> Response:
    answer = RedirectResponse("/console/login", 303)
    answer.delete_cookie(COOKIE, f"{request.state.prefix}/console", httponly=True, samesite="strict")
    return answer


def _place(given: object) -> str:
    """A path of ours: never another site."""
    text = str(given or "/")
    return text if text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable() else "/"


routes = [Route("/login", _ask), Route("/login", _open, methods=["POST"]), Route("/logout", _close, methods=["POST"])]
