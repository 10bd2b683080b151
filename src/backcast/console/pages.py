"""Makes pages of templates. Everything that a template shows is escaped; a number, a time and a JSON value look the
same on every page."""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse

from backcast.console.service import Service
from backcast.errors import UnsupportedBody
from backcast.models import JSON, Lane

STATIC = "static"
LONGEST = 64 * 1024
"""Characters of a JSON value that a page shows; the whole one is a link."""
_SECONDS = ((86_400, "d"), (3600, "h"), (60, "min"))


def span(seconds: float | timedelta | None) -> str:
    """A duration in its two largest units."""
    if seconds is None:
        return "–"
    left = max(0.0, seconds.total_seconds() if isinstance(seconds, timedelta) else seconds)
    if left < 1:
        return f"{left * 1000:.0f} ms"
    if left < 60:
        return f"{left:.1f} s" if left < 10 else f"{left:.0f} s"
    for index, (size, unit) in enumerate(_SECONDS):
        if left >= size:
            whole, rest = divmod(left, size)
            smaller, name = _SECONDS[index + 1] if index + 1 < len(_SECONDS) else (1, "s")
            part = int(rest // smaller)
            return f"{whole:.0f} {unit} {part} {name}" if part else f"{whole:.0f} {unit}"
    raise AssertionError(left)


def ago(at: datetime | None) -> str:
    """How long a moment lies back, or ahead, in one unit."""
    if at is None:
        return "–"
    seconds = (datetime.now(UTC) - at).total_seconds()
    size, unit = next(((size, unit) for size, unit in _SECONDS if abs(seconds) >= size), (1, "s"))
    amount = f"{abs(seconds) / size:.0f} {unit}"
    return "now" if abs(seconds) < 1 else f"{amount} ago" if seconds > 0 else f"in {amount}"


def exact(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def number(value: float | None) -> str:
    """With a thin space between thousands."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:,.3g}"
    return text.replace(",", "\u2009")


def pace(value: float | None) -> str:
    """Runs a minute, which are about right."""
    return number(value) if value is None else number(round(value, 1) if value < 10 else round(value))


def limits(lane: Lane) -> str:
    """Those of a lane, in words; empty if it has none."""
    given = ((lane.max_running, "at once"), (lane.max_per_minute, "per minute"))
    return ", ".join(f"{number(most)} {unit}" for most, unit in given if most is not None)


def pretty(value: JSON) -> str:
    """A JSON value as people read it, cut when it is very long."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n…"


def brief(value: JSON, most: int = 120) -> str:
    """A JSON value in a line of a table."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 1]}…"


@cache
def asset(name: str) -> str:
    """The path of a static file below the console, which changes with the file: browsers may keep it for ever."""
    content = (resources.files("backcast.console") / STATIC / name).read_bytes()
    return f"/console/{STATIC}/{name}?v={hashlib.sha256(content).hexdigest()[:12]}"


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("backcast.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "ago": ago,
        "brief": brief,
        "exact": exact,
        "limits": limits,
        "number": number,
        "pace": pace,
        "pretty": pretty,
        "segment": lambda name: quote(str(name), safe=""),
        "span": span,
    }
    return made


_TEMPLATES = _environment()


def query(**given: object) -> str:
    """A query of those that are set, with its question mark; empty if none is."""
    text = urlencode({name: str(value) for name, value in given.items() if value not in (None, "")})
    return f"?{text}" if text else ""


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """The page of `template` for whoever asks."""
    state = request.state
    about = {
        "root": f"{state.prefix}/console",
        "prefix": state.prefix,
        "path": request.url.path,
        "has_keys": state.has_keys,
        "may_change": state.may_change,
        "signed_in": state.service is not None,
        "query": query,
        "asset": asset,
        "now": lambda: datetime.now(UTC),
    }
    return HTMLResponse(_TEMPLATES.get_template(template).render(about | values), status)


async def read_form(request: Request) -> FormData:
    """The form that a page has sent. Raises `UnsupportedBody`: no page sends files, or another charset than UTF-8."""
    if request.headers.get("content-type", "").strip().lower().startswith("multipart/"):
        raise UnsupportedBody("The pages send their forms as application/x-www-form-urlencoded: do the same.")
    return await request.form()


def service(request: Request) -> Service:
    """The API for whoever asks; a route that needs no session does not call this."""
    found: Service | None = request.state.service
    assert found is not None  # `app._Door` has sent others to the page where they sign in
    return found


Prefixed = Callable[[], str]
"""The path of the request below which links lead, such as `/backcast`; empty at the root."""
