"""Lanes, pools and workers: their limits, pauses and drains."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from backcast.console.pages import read_form, render, service
from backcast.console.runs import parsed
from backcast.errors import BackcastError, InvalidInput
from backcast.models import Limits, PauseKind


async def _lanes(request: Request, status: int = 200, problem: str | None = None) -> Response:
    return render(request, "lanes.html", status, lanes=await service(request).client.lanes(), problem=problem)


async def _limit(request: Request) -> Response:
    """Set the limits of a lane, or lift them if both fields are empty."""
    client, form = service(request).client, await read_form(request)
    name = str(form.get("name", ""))
    limits = {field: parsed(text) for field in Limits.model_fields if (text := str(form.get(field) or "").strip())}
    try:
        if limits:
            await client.limit_lane(name, Limits.model_construct(**limits))  # checked by the API
        else:
            await client.lift_lane(name)
    except BackcastError as error:
        return await _lanes(request, error.status, error.detail)
    return RedirectResponse("/console/lanes", 303)


async def _pools(request: Request) -> Response:
    client = service(request).client
    pools, workers = await asyncio.gather(client.pools(), client.workers())
    return render(request, "pools.html", pools=pools, workers=workers)


async def _drain(request: Request) -> Response:
    await service(request).client.drain(request.path_params["worker_id"])
    return RedirectResponse("/console/pools", 303)


async def _pause(request: Request) -> Response:
    form = await read_form(request)
    options: Any = {"reason": str(form.get("reason", "")), "by": "console"}
    if minutes := str(form.get("minutes") or ""):
        options["until"] = _in(minutes)
    if form.get("release"):
        options["running"] = "release"
    kind, name = _which(form)
    await service(request).client.pause(kind, name, **options)
    return RedirectResponse(_page(kind), 303)


def _in(minutes: str) -> datetime:
    try:
        return datetime.now(UTC) + timedelta(minutes=float(minutes))
    except (ValueError, OverflowError):
        raise InvalidInput("Write the minutes of the pause as a number; it must end before the year 10000.") from None


async def _resume(request: Request) -> Response:
    kind, name = _which(await read_form(request))
    await service(request).client.resume(kind, name)
    return RedirectResponse(_page(kind), 303)


def _which(form: FormData) -> tuple[PauseKind, str]:
    kinds: dict[str, PauseKind] = {kind.value: kind for kind in PauseKind}
    return kinds.get(str(form.get("kind")), PauseKind.LANE), str(form.get("name", ""))


def _page(kind: PauseKind) -> str:
    return f"/console/{kind.value}s"


routes = [
    Route("/lanes", _lanes),
    Route("/lanes", _limit, methods=["POST"]),
    Route("/pools", _pools),
    Route("/workers/{worker_id:uuid}/drain", _drain, methods=["POST"]),
    Route("/pause", _pause, methods=["POST"]),
    Route("/resume", _resume, methods=["POST"]),
]
