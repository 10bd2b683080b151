"""The page where a text is cast to a shape, and the answer is watched as it comes."""

import asyncio
import json
import shlex
from typing import Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from backcast.console.pages import brief, query, read_form, render, service
from backcast.console.runs import or_problem
from backcast.console.shapes import target
from backcast.errors import BackcastError, InvalidInput
from backcast.models import CAST, JSON, Run, State

_EXAMPLE = {
    "data": "Anna Kowalska (34) moved from Poznań to Lisbon in May; write to anna@example.org.",
    "shape": "name, age, city, email",
    "instructions": "",
}
_LATEST = 5
_IN_ADDRESS = 500
"""Characters of a shape that stays as it was written; a longer one is shown as the JSON Schema that it means. Proxies
take few kilobytes of headers."""


async def _page(request: Request, status: int = 200, problem: str | None = None, form: JSON = None) -> Response:
    """The form and the answer to the run that the query names; without one, the latest cast."""
    client = service(request).client
    latest = (await client.page(limit=_LATEST, task=CAST)).items
    run = result = None
    if form is None:
        form = _EXAMPLE
        if wanted := _id(request.query_params.get("run")):
            run = await client.get(wanted)
        elif latest:
            run = latest[0]
    if run is not None:
        (kept, _), result = await asyncio.gather(or_problem(client.input(run.id)), _result(request, run))
        form = _form(kept, request.query_params.get("shape")) if isinstance(kept, dict) else form
    texts = await asyncio.gather(*(_text(request, each) for each in latest))
    snippets = _snippets(str(request.base_url).removesuffix("/console/").rstrip("/"), form)
    return render(
        request,
        "try.html",
        status,
        form=form,
        run=run,
        result=result,
        latest=list(zip(latest, texts, strict=True)),
        problem=problem,
        schema=_schema(form["shape"]),
        snippets=snippets,
        cast=CAST,
    )


def _id(text: str | None) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        raise InvalidInput("The id of a run is a UUID.") from None


async def _result(request: Request, run: Run) -> tuple[JSON, str | None]:
    if run.state is not State.COMPLETED:
        return None, None
    return await or_problem(service(request).client.result(run.id))


async def _text(request: Request, run: Run) -> str:
    """By which people know a cast."""
    kept, _ = await or_problem(service(request).client.input(run.id))
    return brief(kept.get("data", "")) if isinstance(kept, dict) else ""


def _form(kept: dict[str, JSON], shape: str | None) -> dict[str, str]:
    """The form that asks for this input again."""
    data, wanted = kept.get("data", ""), kept.get("target", "")
    return {
        "data": data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, indent=2),
        "shape": shape or (wanted if isinstance(wanted, str) else json.dumps(wanted, ensure_ascii=False, indent=2)),
        "instructions": str(kept.get("instructions") or ""),
    }


def _schema(shape: str) -> tuple[JSON, str | None]:
    try:
        return target(shape), None
    except InvalidInput as error:
        return None, error.detail


async def _shape(request: Request) -> Response:
    """The target that a shape means, while it is written."""
    return render(request, "shape.html", schema=_schema(str((await read_form(request)).get("shape", ""))))


async def _submit(request: Request) -> Response:
    given = await read_form(request)
    form = {name: str(given.get(name, "")) for name in _EXAMPLE}
    try:
        wanted: dict[str, Any] = {"data": form["data"], "target": target(form["shape"]), "stream": True}
        if form["instructions"].strip():
            wanted["instructions"] = form["instructions"].strip()
        run = await service(request).client.submit(CAST, wanted)
    except BackcastError as error:
        return await _page(request, error.status, error.detail, form)
    written = form["shape"] if len(form["shape"]) <= _IN_ADDRESS else None
    return RedirectResponse(f"/console/try{query(run=run.id, shape=written)}", 303)


def _snippets(url: str, form: JSON) -> dict[str, str]:
    """The same cast as a command and as a program; a key is the caller's to fill in."""
    shape, _ = _schema(form["shape"])
    wanted = {"data": form["data"], "target": shape, "instructions": form["instructions"]}
    body = json.dumps({"input": {name: value for name, value in wanted.items() if value}}, ensure_ascii=False)
    more = f", {form['instructions']!r}" if form["instructions"] else ""
    return {
        "curl": f"curl {url}/v1/tasks/{CAST}/runs -H 'Prefer: wait=60' \\\n"
        f"  -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        "Python": f"from backcast import Client\n\nwith Client({url!r}) as client:\n"
        f"    print(client.cast({form['data']!r}, {shape!r}{more}))",
    }


routes = [
    Route("/try", _page),
    Route("/try", _submit, methods=["POST"]),
    Route("/try/shape", _shape, methods=["POST"]),
]
