"""Batches: many runs in one request, as JSON Lines. All of them are accepted, or none; errors name their lines."""

import hashlib
from collections.abc import AsyncIterator
from typing import Any, Literal
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from pydantic_core import to_json

from backcast.api import batch_lines, problems
from backcast.api.batch_lines import Reader
from backcast.api.body import media_type
from backcast.api.deps import Backend, Deps
from backcast.api.routing import Route
from backcast.api.runs import IDEMPOTENCY_KEY, SUBMIT_PROBLEMS
from backcast.api.submit import idempotency_key
from backcast.errors import (
    BodyTooLarge,
    InvalidInput,
    LedgerUnavailable,
    ResultGone,
    StoreUnavailable,
    TooManyWaiting,
    UnknownBatch,
    UnsupportedBody,
)
from backcast.ledger import batches
from backcast.ledger.batches import Item
from backcast.models import Batch, Name, uuid7
from backcast.store import Missing

router = APIRouter(prefix="/v1/batches", tags=["batches"], route_class=Route)

PATH = "/v1/batches"
JSON_LINES = "application/jsonl"
LINES: dict[int | str, dict[str, Any]] = {
    200: {"description": "JSON Lines", "content": {JSON_LINES: {"schema": {"type": "string"}}}}
}
_KINDS = (JSON_LINES, "application/x-ndjson", "application/ndjson", "application/x-jsonlines")
_LISTED = 100
"""Batches in the list."""

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            JSON_LINES: {
                "schema": {
                    "type": "string",
                    "description": 'One JSON object per line: `{"task": "echo", "input": {"value": 1}, "priority": 5}`',
                },
            }
        },
    }
}


@router.post(
    "",
    status_code=202,
    summary="Submit many runs at once",
    description=(
        "One run per line: `task`, and the fields of a submission. `task` and `owner` may be given once, as query"
        " parameters. All runs are accepted, or none; a batch has one owner. An `Idempotency-Key` holds for the whole"
        " batch. Wrong lines are named by `errors[].pointer`: `/<line, from 0>/<field>`, for up to 20 lines. With"
        " `on_error=skip` they make no run and the others do, unless all are wrong. A `custom_id` names a line: it is"
        " in its result or error, and a label of its run (`metadata.custom_id`)."
    ),
    response_model=Batch,
    responses=SUBMIT_PROBLEMS,  # and NoSpace, which is a 503 too
    openapi_extra={"parameters": [IDEMPOTENCY_KEY], **_BODY},
)
async def submit_batch(
    request: Request,
    deps: Deps,
    task: Name | None = None,
    owner: Name | None = None,
    on_error: Literal["reject", "skip"] = "reject",
) -> Response:
    if (kind := media_type(request)) not in _KINDS:
        kind = kind or "of no stated type"
        raise UnsupportedBody(f"The body is {kind}: send one JSON object per line, with `Content-Type: {JSON_LINES}`.")
    key = idempotency_key(request)
    given = {name: value for name, value in (("task", task), ("owner", owner)) if value is not None}
    skips = on_error == "skip"
    digest = hashlib.sha256(to_json(given | ({"on_error": on_error} if skips else {})))
    batch_id = uuid7()
    reader = Reader(deps, batch_id, given)
    kept = False
    try:
        async for number, line in batch_lines.lines(request, digest, deps.limits.max_body):
            if len(reader.rows) + reader.wrong >= deps.limits.max_batch:
                raise BodyTooLarge(f"A batch may have {deps.limits.max_batch} lines: send more batches.")
            await reader.read(number, line)
            if reader.wrong >= batch_lines.WRONG and not skips and key is None:
                break
        try:
            if not (skips and len(reader.rows)):
                reader.check()
            assert reader.owner is not None
            await deps.admission.admit(reader.owner, len(reader.rows))
        except (InvalidInput, TooManyWaiting):
            if key is None or reader.owner is None:
                raise
            submitted = await batches.repeated(deps.ledger, reader.owner, key, digest.digest())
            if submitted is None:
                raise
        else:
            await reader.stored()
            kept = True  # from here on it may be recorded, even if no answer reaches us
            submitted = await batches.submit(
                deps.ledger,
                batch_id,
                reader.owner,
                reader.rows.pieces(batches.SLICE),
                size=len(reader.rows),
                key=key,
                request_hash=digest.digest(),
                skipped=reader.wrong,
                errors=reader.errors(),
            )
            kept = submitted.fresh
    finally:
        reader.rows.close()
        if not kept:
            await reader.drop()
    headers = {"Location": f"{PATH}/{submitted.batch.id}", "Retry-After": "1"}
    if submitted.fresh:
        deps.metrics.submitted(submitted.batch.size)
    else:
        headers["Idempotent-Replayed"] = "true"
    return Response(submitted.batch.model_dump_json(), 202, headers, "application/json")


class BatchList(BaseModel):
    items: list[Batch]


@router.get(
    "",
    summary="List the latest batches",
    description=(
        f"The newest first, at most 100. `states` are counted for the newest {batches.COUNTED:,} runs, and empty for"
        " older batches: `GET /v1/batches/{batch_id}` has them."
    ),
    responses=problems.responses(LedgerUnavailable),
)
async def list_batches(deps: Deps) -> BatchList:
    return BatchList(items=await batches.latest(deps.ledger, _LISTED))


@router.get("/{batch_id}", summary="Get a batch", responses=problems.responses(UnknownBatch, LedgerUnavailable))
async def get_batch(batch_id: UUID, deps: Deps) -> Batch:
    return await batches.get(deps.ledger, batch_id)


@router.post(
    "/{batch_id}/cancel",
    summary="Cancel the runs that have not ended",
    description="Queued runs never start; running ones are asked to stop. Runs that have ended stay as they are.",
    responses=problems.responses(UnknownBatch, LedgerUnavailable),
)
async def cancel_batch(batch_id: UUID, deps: Deps) -> Batch:
    return await batches.cancel(deps.ledger, batch_id)


@router.get(
    "/{batch_id}/errors",
    summary="Get the errors of skipped lines",
    description=(
        "One line per wrong line, for the first 1,000:"
        ' `{"line" (from 1), "custom_id", "code", "detail", "errors": [{"pointer", "detail"}]}`.'
    ),
    response_model=None,
    responses=LINES | problems.responses(UnknownBatch, LedgerUnavailable),
)
async def get_errors(batch_id: UUID, deps: Deps) -> Response:
    return Response(await batches.errors(deps.ledger, batch_id), media_type=JSON_LINES)


@router.get(
    "/{batch_id}/results",
    summary="Get the results of a batch",
    description=(
        "One line per run, in the order of submission, finished or not:"
        ' `{"id", "state", "custom_id", "metadata", "result" | "error"}`, without those that it lacks. A completed run'
        " whose result can't be read has an `error`."
    ),
    response_model=None,
    responses=LINES | problems.responses(UnknownBatch, LedgerUnavailable),
)
async def get_results(batch_id: UUID, deps: Deps) -> Response:
    await batches.get(deps.ledger, batch_id)
    return StreamingResponse(_written(deps, batch_id), media_type=JSON_LINES)


async def _written(deps: Backend, batch_id: UUID) -> AsyncIterator[bytes]:
    """An error from here on can't become a problem document: it cuts off the answer, which its reader notices."""
    page = bytearray()
    async for item in batches.results(deps.ledger, batch_id):
        head = f'{{"id":"{item.id}","state":"{item.state.value}"'.encode()
        if (custom_id := item.metadata.get("custom_id")) is not None:
            head += b',"custom_id":%b' % to_json(custom_id)
        if item.metadata:
            head += b',"metadata":%b' % to_json(item.metadata)
        if item.text is not None:
            page += b'%b,"result":%b}\n' % (head, item.text.encode())
        elif item.key is not None:
            yield bytes(page)
            page.clear()
            async for chunk in _stored(deps, head, item):
                yield chunk
        else:
            error = b',"error":%b' % item.error.model_dump_json().encode() if item.error else b""
            page += b"%b%b}\n" % (head, error)
        if len(page) > 64 * 1024:
            yield bytes(page)
            page.clear()
    yield bytes(page)


async def _stored(deps: Backend, head: bytes, item: Item) -> AsyncIterator[bytes]:
    assert item.key is not None
    try:
        chunks = await deps.store.stream(item.key)
    except Missing:
        yield b'%b,"error":%b}\n' % (head, to_json({"code": ResultGone.code, "title": ResultGone.title}))
        return
    except StoreUnavailable as error:
        problem = {"code": error.code, "title": error.title, "detail": error.detail}
        yield b'%b,"error":%b}\n' % (head, to_json(problem))
        return
    yield head + b',"result":'
    async for chunk in chunks:
        yield chunk
    yield b"}\n"
