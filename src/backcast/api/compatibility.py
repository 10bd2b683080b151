"""The compatibility routes: the two of Prefect's background-task example, unchanged in meaning. They submit and read
the same runs as all other routes.
"""

import json
from collections.abc import AsyncIterator
from typing import Any, Literal
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header

from backcast.api import problems
from backcast.api.body import json_body, media_type, validate
from backcast.api.deps import backend
from backcast.api.fast_path import RUN_ID, FastRoute, run_id
from backcast.api.runs import IDEMPOTENCY_KEY, PREFER, SUBMIT_PROBLEMS, json_request, stored
from backcast.api.submit import idempotency_key, submit
from backcast.errors import LedgerUnavailable, StoreUnavailable, UnknownRun, UnsupportedBody
from backcast.ledger import runs
from backcast.models import CAST, JSON, State, Submission

router = APIRouter(tags=["as in Prefect's example"], route_class=FastRoute)

FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
_PLACES = {"data": "/payload", "target": "/target_type", "instructions": "/instructions"}


class CastRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    payload: JSON
    """The data to cast: text, or any JSON value."""
    target_type: str | dict[str, JSON]
    """The wanted shape: a name such as `int` or `list[str]`, or a JSON Schema."""
    instructions: str | None = None
    """The thing to look for, in words."""
    stream: bool = False
    """Whether the run's stream of events shows the answer as it grows."""


_FORM = {
    "type": "object",
    "properties": {
        "payload": {"type": "string", "description": "Text; text that parses as JSON is JSON."},
        "target_type": {"type": "string", "description": "A name such as `int`, or a JSON Schema."},
        "instructions": {"type": "string", "description": "The thing to look for, in words."},
        "stream": {"enum": ["true", "false"], "description": "Whether the run's events show the answer as it grows."},
    },
    "required": ["payload", "target_type"],
    "additionalProperties": False,
}
_BODY = json_request(CastRequest)
_BODY["requestBody"]["content"] |= {kind: {"schema": _FORM} for kind in FORMS}


class Accepted(BaseModel):
    task_run_id: UUID


class Status(BaseModel):
    task_run_id: UUID
    status: Literal["completed", "pending", "error"]
    result: JSON = None
    """Only if completed."""
    message: str | None = None
    """Only if not completed."""


async def _form_or_json(request: Request) -> dict[str, Any]:
    if media_type(request) not in FORMS:
        return await json_body(request)
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8"):
        raise UnsupportedBody(f"The form is in {charset.decode('latin-1')!r}: send it in UTF-8.")
    async with request.form(max_files=0, max_fields=10) as form:
        fields: dict[str, Any] = {name: value for name, value in form.items() if value != "" or name == "payload"}
    for name in ("payload", "target_type"):  # a form has only text; text that parses as JSON is JSON
        try:
            value = from_json(fields[name], allow_inf_nan=False)
        except (ValueError, KeyError):
            continue
        if name == "payload" or isinstance(value, dict):
            fields[name] = value
    return fields


@router.post(
    "/tasks",
    status_code=202,
    summary="Cast a payload into a wanted type",
    response_model=Accepted,
    responses=SUBMIT_PROBLEMS,
    openapi_extra={"parameters": [IDEMPOTENCY_KEY, PREFER], **_BODY},
)
async def create_task(request: Request) -> Response:
    cast = validate(CastRequest, await _form_or_json(request))
    given = {"data": cast.payload, "target": cast.target_type, "instructions": cast.instructions}
    submission = Submission(input=given | ({"stream": True} if cast.stream else {}))
    deps = backend(request)
    submitted = await submit(deps, CAST, submission, key=idempotency_key(request), places=_PLACES)
    run, headers = await deps.waits.until_ended(request, submitted.run)
    headers |= {"Location": f"/tasks/{run.id}/status", "Retry-After": "1"}
    return Response(f'{{"task_run_id":"{run.id}"}}', 202, headers, "application/json")


@router.get(
    "/tasks/{run_id}/status",
    summary="Get the status of a task",
    response_model=Status,
    responses=problems.responses(UnknownRun, LedgerUnavailable, StoreUnavailable),
    openapi_extra={"parameters": [RUN_ID, PREFER]},
)
async def get_status(request: Request) -> Response:
    deps = backend(request)
    found = await runs.result(deps.ledger, run_id(request))
    ended, headers = await deps.waits.until_ended(request, found.run)
    if ended.state is not found.run.state:
        found = await runs.result(deps.ledger, ended.id)
    match found.run.state:
        case State.COMPLETED:
            head = f'{{"task_run_id":"{found.run.id}","status":"completed","result":'
            if found.text is not None:
                return Response(f"{head}{found.text}}}", 200, headers, "application/json")
            chunks = await stored(deps, found)
            return StreamingResponse(_wrapped(head.encode(), chunks), 200, headers, "application/json")
        case State.QUEUED | State.RUNNING:
            status, message = "pending", f"The run is {found.run.state.value}."
        case State.FAILED | State.CANCELLED | State.EXPIRED:
            error = found.run.error
            status = "error"
            message = error.detail if error else f"The run is {found.run.state.value}."
    body = {"task_run_id": str(found.run.id), "status": status, "message": message}
    headers |= {"Retry-After": "1"} if status == "pending" else {}
    return Response(json.dumps(body), 200, headers, "application/json")


async def _wrapped(head: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield head
    async for chunk in chunks:
        yield chunk
    yield b"}"
