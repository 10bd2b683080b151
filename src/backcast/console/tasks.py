"""Tasks: what can be run, a form made of each one's schema, and how its latest runs went."""

import asyncio
import json
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import unquote

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from backcast.console.pages import read_form, render, service
from backcast.console.runs import parsed
from backcast.errors import BackcastError, InvalidInput
from backcast.models import JSON, Counts, Run, State, TaskType, Within

_SAMPLE = 100
"""The latest runs of a task of which its page gives durations."""


_KINDS = {"string": "text", "integer": "int", "number": "number", "boolean": "bool"}


class Field(NamedTuple):
    """A field of the form for an input. `kind` is that of its control: one for JSON takes whatever has no other."""

    name: str
    kind: str
    required: bool
    about: str
    value: str
    choices: tuple[str, ...] = ()


class Record(NamedTuple):
    """How a task went lately; durations in seconds, of the latest runs that have completed."""

    ended: int
    failed: int
    """Or expired, of those that ended in the last day."""
    median: float | None
    slow: float | None
    """Nine of ten were faster."""


def fields(schema: JSON) -> list[Field]:
    """The form for inputs of this schema, a control for each property."""
    properties: dict[str, Any] = schema.get("properties") or {}
    found = list[Field]()
    for name, about in properties.items():
        one: dict[str, Any] = about if isinstance(about, dict) else {}
        choices = tuple(value for value in one.get("enum", ()) if isinstance(value, str))
        kind = _KINDS.get(str(one.get("type")), "json")
        if choices and len(choices) == len(one["enum"]):
            kind = "choice"
        value = one.get("default")
        shown = "" if value is None else value if isinstance(value, str) and kind != "json" else json.dumps(value)
        required = name in schema.get("required", ())
        found.append(Field(name, kind, required, str(one.get("description", "")), shown, choices))
    return found


def filled(form: FormData, wanted: Sequence[Field]) -> dict[str, JSON]:
    """The input that a form gives: a field that is left empty is left out, unless it has to be there.

    Raises:
        InvalidInput: a value is not JSON.
    """
    given = dict[str, JSON]()
    for field in wanted:
        text = str(form.get(f"input.{field.name}", ""))
        if not text and not (field.required and field.kind == "text"):
            continue
        try:
            given[field.name] = text if field.kind in ("text", "choice") else parsed(text)
        except InvalidInput as error:
            raise InvalidInput(f"{field.name}: {error.detail}") from None
    return given


def record(counts: Counts, name: str, completed: Sequence[Run]) -> Record:
    states = next((each.states for each in counts.tasks if each.task == name), {})
    failed = states.get(State.FAILED, 0) + states.get(State.EXPIRED, 0)
    took = sorted(
        (run.finished_at - run.started_at).total_seconds()
        for run in completed
        if run.finished_at is not None and run.started_at is not None
    )
    slow = took[int(len(took) * 0.9)] if took else None
    ended = sum(runs for state, runs in states.items() if state.is_final)
    return Record(ended, failed, median(took) if took else None, slow)


async def _list(request: Request) -> Response:
    client = service(request).client
    tasks, pauses = await asyncio.gather(client.tasks(), client.pauses())
    paused = {each.name: each for each in pauses if each.kind == "task"}
    return render(request, "tasks.html", tasks=tasks, paused=paused)


async def _one(
    request: Request, status: int = 200, problem: str | None = None, given: FormData | None = None
) -> Response:
    client, name = service(request).client, unquote(request.path_params["name"])
    task, latest, completed, counts = await asyncio.gather(
        client.task(name),
        client.page(limit=10, task=name),
        client.page(limit=_SAMPLE, task=name, state=State.COMPLETED),
        client.counts(Within.DAY),
    )
    form = [_again(field, given) for field in fields(task.input_schema)]
    shown = {"task": task, "form": form, "runs": latest.items, "record": record(counts, name, completed.items)}
    return render(request, "task.html", status, problem=problem, **shown)


def _again(field: Field, given: FormData | None) -> Field:
    return field if given is None else field._replace(value=str(given.get(f"input.{field.name}", "")))


async def _start(request: Request) -> Response:
    client, name = service(request).client, unquote(request.path_params["name"])
    form = await read_form(request)
    try:
        task: TaskType = await client.task(name)
        run = await client.submit(name, filled(form, fields(task.input_schema)))
    except BackcastError as error:
        return await _one(request, error.status, error.detail, form)
    return RedirectResponse(f"/console/runs/{run.id}", 303)


routes = [
    Route("/tasks", _list),
    Route("/tasks/{name}", _one),
    Route("/tasks/{name}", _start, methods=["POST"]),
]
