"""Runs: the list with its filters, and one run with everything that is known of it."""

import asyncio
import json
from collections.abc import Awaitable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from backcast.console.pages import LONGEST, read_form, render, service
from backcast.errors import BackcastError, InvalidInput
from backcast.models import JSON, Attempts, Run, State, parse_json

PAGE = 50
LOG_LINES = 500
"""The last lines of a log that the page of a run shows."""
_SINCE = {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(days=7)}
_WORDS = ("state", "task", "owner", "lane", "batch", "worker", "error", "text")
FIELDS = (*_WORDS, "label", "since")
"""Of the form of filters."""

T = TypeVar("T")


def given(params: Mapping[str, Any]) -> dict[str, str]:
    """What is set of a form of filters."""
    return {name: text for name in FIELDS if (text := str(params.get(name) or "").strip())}


def filters(chosen: Mapping[str, str]) -> Any:
    """As the client takes them. Raises `InvalidInput`."""
    wanted: dict[str, Any] = {name: chosen[name] for name in _WORDS if name in chosen}
    if label := chosen.get("label"):
        name, equals, value = label.partition("=")
        if not equals:
            raise InvalidInput("A label is written as name=value.")
        wanted["metadata"] = {name.strip(): value.strip()}
    if since := chosen.get("since"):
        wanted["created_after"] = datetime.now(UTC) - _SINCE.get(since, timedelta())
    return wanted


async def _list(request: Request) -> Response:
    client, chosen = service(request).client, given(request.query_params)
    cursor = request.query_params.get("cursor")
    problem, page, status = None, None, 200
    try:
        page = await client.page(limit=PAGE, cursor=cursor, **filters(chosen))
    except BackcastError as error:
        problem, status = error.detail, error.status
    tasks = [task.name for task in await client.tasks()]
    return render(
        request,
        "runs.html",
        status,
        page=page,
        chosen=chosen,
        form=dict.fromkeys(FIELDS, "") | chosen,
        cursor=cursor,
        tasks=tasks,
        states=[*State],
        problem=problem,
    )


class Bar(NamedTuple):
    """A part of the waterfall; `left` and `width` in percent of all the time."""

    label: str
    kind: str
    left: float
    width: float
    title: str


def waterfall(run: Run, attempts: Attempts) -> list[Bar]:
    """The time of a run from its submission: until its first start, and each attempt that is kept."""
    end = run.finished_at or datetime.now(UTC)
    whole = max((end - run.created_at).total_seconds(), 0.001)

    def bar(label: str, kind: str, since: datetime, until: datetime, title: str) -> Bar:
        left = min(max((since - run.created_at).total_seconds() / whole, 0.0), 1.0) * 100
        width = max((until - since).total_seconds() / whole * 100, 0.0)
        return Bar(label, kind, round(left, 2), round(min(width, 100 - left), 2), title)

    starts = [each.started_at for each in attempts.items if each.started_at is not None]
    bars = [bar("waits", "waits", run.created_at, min([*starts, end]), "")]
    for each in attempts.items:
        if each.started_at is not None:
            title = each.error.detail if each.error else ""
            bars.append(bar(f"attempt {each.number}", each.outcome, each.started_at, each.ended_at or end, title))
    return bars


async def or_problem(asked: Awaitable[T]) -> tuple[T | None, str | None]:
    """A part that a page can do without, or the reason why it is not there."""
    try:
        return await asked, None
    except BackcastError as error:
        return None, error.detail


async def _one(request: Request, status: int = 200, problem: str | None = None, text: str | None = None) -> Response:
    client, run_id = service(request).client, request.path_params["run_id"]
    run = await client.get(run_id)
    why, attempts, kept, logs, result = await asyncio.gather(
        client.why(run_id),
        client.attempts(run_id),
        or_problem(client.input(run_id)),
        or_problem(client.logs(run_id)),
        or_problem(client.result(run_id)) if run.state is State.COMPLETED else asyncio.sleep(0, (None, None)),
    )
    return render(
        request,
        "run.html",
        status,
        run=run,
        why=why,
        attempts=attempts,
        bars=waterfall(run, attempts),
        kept=kept,
        is_long=len(json.dumps(kept[0])) > LONGEST,
        logs=(logs[0] or [], logs[1]),
        most_lines=LOG_LINES,
        result=result,
        problem=problem,
        text=text,
        prefect_ui=request.app.state.prefect_ui,
    )


async def _cancel(request: Request) -> Response:
    run = await service(request).client.cancel(request.path_params["run_id"])
    return RedirectResponse(f"/console/runs/{run.id}", 303)


async def _retry(request: Request) -> Response:
    """With the input of the form, if it has one that differs."""
    client, run_id = service(request).client, request.path_params["run_id"]
    text = (await read_form(request)).get("input")
    try:
        changes: Any = {} if text is None else {"input": parsed(str(text))}
        again = await client.retry(run_id, **changes)
    except BackcastError as error:
        return await _one(request, error.status, error.detail, None if text is None else str(text))
    return RedirectResponse(f"/console/runs/{again.id}", 303)


def parsed(text: str) -> JSON:
    """Raises `InvalidInput`."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise InvalidInput(f"This is not JSON: {error}.") from None


def _part(name: str, query: str = "") -> Route:
    async def answer(request: Request) -> Response:
        run_id: UUID = request.path_params["run_id"]
        return service(request).answer(f"/v1/runs/{run_id}/{name}", query)

    return Route(f"/runs/{{run_id:uuid}}/{name}", answer)


routes = [
    Route("/runs", _list),
    Route("/runs/{run_id:uuid}", _one),
    Route("/runs/{run_id:uuid}/cancel", _cancel, methods=["POST"]),
    Route("/runs/{run_id:uuid}/retry", _retry, methods=["POST"]),
    _part("events", "logs=true"),  # so that its lines come while it runs
    *map(_part, ("input", "logs", "result")),
]
