"""Batches: many runs in one request, as JSON Lines. All of them are accepted, or none; errors name their lines.

Lines are read, checked and dropped as they come, a few at a time, so that other requests go on meanwhile.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from pydantic_core import to_json

from backcast.api import problems
from backcast.api.body import media_type, parse_json, validate
from backcast.api.deps import Backend, Deps, Known
from backcast.api.routing import Route
from backcast.api.runs import IDEMPOTENCY_KEY, SUBMIT_PROBLEMS
from backcast.api.submit import check_input, idempotency_key, in_json, late
from backcast.errors import (
    BodyTooLarge,
    ClientError,
    FieldError,
    InvalidInput,
    LedgerUnavailable,
    ResultGone,
    StoreUnavailable,
    TooManyWaiting,
    UnknownBatch,
    UnknownTask,
    UnsupportedBody,
)
from backcast.ledger import batches, submissions
from backcast.ledger.batches import Item
from backcast.ledger.submissions import New
from backcast.models import JSON, Batch, Name, Submission, uuid7
from backcast.store import Missing

router = APIRouter(prefix="/v1/batches", tags=["batches"], route_class=Route)

PATH = "/v1/batches"
JSON_LINES = "application/jsonl"
_KINDS = (JSON_LINES, "application/x-ndjson", "application/ndjson", "application/x-jsonlines")
_SLICE = 100
"""Lines after which other requests have a turn: some milliseconds."""
_WRONG = 20
"""Wrong lines that are reported; after them the rest is not read."""
_PUTS = 8
"""Large inputs that are stored at the same time."""

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


class _Line(Submission):
    task: Name


class _Reader:
    """Makes rows from lines. Ids rise strictly with the lines, so that their order is the order of the batch."""

    def __init__(self, backend: Backend, batch_id: UUID, given: dict[str, JSON]) -> None:
        self._backend = backend
        self._batch_id = batch_id
        self._given = given
        self._last = 0
        self._known: dict[str, Known | ClientError] = {}
        self._puts: set[asyncio.Task[None]] = set()
        self._stored_until: datetime | None = None
        self.rows: list[New] = []
        self.owner: str | None = None
        self.wrong: list[tuple[int, ClientError]] = []
        self.late: list[tuple[int, ClientError]] = []
        """Lines whose deadline has passed: wrong, unless the batch is sent again."""

    async def read(self, number: int, line: bytes) -> None:
        try:
            found = await self._read(line)
        except ClientError as error:
            self.wrong.append((number, error))
        else:
            if (error := late(found)) is not None:
                self.late.append((number, error))

    async def _read(self, line: bytes) -> Submission:
        given = parse_json(line)
        found = validate(_Line, self._given | given if isinstance(given, dict) else given)
        self.owner = self.owner or found.owner
        if found.owner != self.owner:
            raise InvalidInput(
                f"/owner: a batch has one owner, and this one has {self.owner!r} already.",
                errors=(FieldError("/owner", "not the owner of the lines before"),),
            )
        known = await self._task(found.task)
        task = check_input(known, found.input)
        body = in_json(found.input)
        self._last = max(uuid7().int, self._last + 1)
        run_id = UUID(int=self._last)
        large = submissions.input_key(run_id) if len(body) > submissions.INLINE_INPUT else None
        if large is not None:
            await self._store(large, body)
        self.rows.append(
            submissions.new(
                task,
                found,
                run_id=run_id,
                input_text=body.decode() if large is None else None,
                input_key=large,
                input_hash=b"",
                batch_id=self._batch_id,
                stored_until=self._stored_until,
            )
        )
        return found

    async def _task(self, name: str) -> Known:
        """The task, looked up once per batch; an unknown one too."""
        known = self._known.get(name)
        if known is None:
            try:
                known = await self._backend.known(name)
            except UnknownTask as error:
                known = InvalidInput(error.detail, errors=(FieldError("/task", "unknown"),))
            self._known[name] = known
        if isinstance(known, ClientError):
            raise known
        return known

    async def _store(self, key: str, body: bytes) -> None:
        self._stored_until = self._stored_until or await submissions.stored_until(self._backend.ledger)
        if len(self._puts) >= _PUTS:
            done, self._puts = await asyncio.wait(self._puts, return_when=asyncio.FIRST_COMPLETED)
            for put in done:
                put.result()
        self._puts.add(asyncio.create_task(self._backend.store.put(key, body)))

    async def stored(self) -> None:
        """Wait until every large input is in the store. Raises `StoreUnavailable`."""
        await asyncio.gather(*self._puts)

    async def drop(self) -> None:
        """Delete the large inputs of a batch that is not recorded. The orphan sweep removes any that stay behind."""
        await asyncio.gather(*self._puts, return_exceptions=True)  # a cancelled one may still be written
        try:
            await self._backend.store.delete([row.input_key for row in self.rows if row.input_key is not None])
        except StoreUnavailable:
            return

    def check(self) -> None:
        """Raises `InvalidInput` that names the wrong lines."""
        if self.wrong:
            errors = tuple(
                FieldError(f"/{number}{field.pointer}", field.detail)
                for number, error in self.wrong
                for field in (error.errors or (FieldError("", error.detail),))
            )
            number, first = self.wrong[0]
            more = f" So are {len(self.wrong) - 1} more lines." if len(self.wrong) > 1 else ""
            raise InvalidInput(f"Line {number + 1} is wrong: {first.detail}{more}", errors=errors)
        if not self.rows:
            raise InvalidInput("The batch is empty: send one run per line.")


async def _lines(request: Request, digest: Any, longest: int) -> AsyncIterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 0. Other requests have a turn every `_SLICE` lines, and at
    every piece of the body."""
    number, line = 0, bytearray()
    async for piece in request.stream():
        digest.update(piece)
        first, *others = piece.split(b"\n")
        line += first
        for other in others:
            if line.strip():
                yield number, bytes(line)
            number, line = number + 1, bytearray(other)
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        if len(line) > longest:
            raise BodyTooLarge(f"A line may have {longest} bytes: send less, or send a link to the data instead.")
        await asyncio.sleep(0)
    if line.strip():
        yield number, bytes(line)


@router.post(
    "",
    status_code=202,
    summary="Submit many runs at once",
    description=(
        "One run per line: `task`, and the fields of a submission. `task` and `owner` may be given once, as query"
        " parameters. All runs are accepted, or none; a batch has one owner. An `Idempotency-Key` holds for the whole"
        " batch. Wrong lines are named by `errors[].pointer`: `/<line, from 0>/<field>`, for up to 20 lines."
    ),
    response_model=Batch,
    responses=SUBMIT_PROBLEMS,
    openapi_extra={"parameters": [IDEMPOTENCY_KEY], **_BODY},
)
async def submit_batch(request: Request, deps: Deps, task: Name | None = None, owner: Name | None = None) -> Response:
    if (kind := media_type(request)) not in _KINDS:
        kind = kind or "of no stated type"
        raise UnsupportedBody(f"The body is {kind}: send one JSON object per line, with `Content-Type: {JSON_LINES}`.")
    key = idempotency_key(request)
    given = {name: value for name, value in (("task", task), ("owner", owner)) if value is not None}
    digest = hashlib.sha256(to_json(given))
    batch_id = uuid7()
    reader = _Reader(deps, batch_id, given)
    kept = False
    try:
        async for number, line in _lines(request, digest, deps.limits.max_body):
            if len(reader.rows) >= deps.limits.max_batch:
                raise BodyTooLarge(f"A batch may have {deps.limits.max_batch} runs: send more batches.")
            await reader.read(number, line)
            if len(reader.wrong) >= _WRONG:
                break
        if reader.late and not (key and reader.owner and await batches.has_key(deps.ledger, reader.owner, key)):
            reader.wrong = sorted(reader.wrong + reader.late[:_WRONG], key=lambda wrong: wrong[0])
        reader.check()
        assert reader.owner is not None
        await _admit(deps, reader.owner, len(reader.rows), key)
        await reader.stored()
        kept = True  # from here on it may be recorded, even if no answer reaches us
        submitted = await batches.submit(
            deps.ledger, batch_id, reader.owner, reader.rows, key=key, request_hash=digest.digest()
        )
        kept = submitted.fresh
    finally:
        if not kept:
            await reader.drop()
    headers = {"Location": f"{PATH}/{submitted.batch.id}", "Retry-After": "1"}
    if not submitted.fresh:
        headers["Idempotent-Replayed"] = "true"
    return Response(submitted.batch.model_dump_json(), 202, headers, "application/json")


async def _admit(deps: Backend, owner: str, runs: int, key: str | None) -> None:
    try:
        await deps.admission.admit(owner, runs)
    except TooManyWaiting:
        if key is None or not await batches.has_key(deps.ledger, owner, key):
            raise


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


class BatchResult(BaseModel):
    """A line of the results: with `result` if the run completed, with `error` if there will be no result."""

    id: UUID
    state: str
    result: JSON = None
    error: dict[str, str] | None = None


@router.get(
    "/{batch_id}/results",
    summary="Get the results of a batch",
    description=(
        "One line per run, in the order of submission, finished or not:"
        ' `{"id", "state", "result" | "error"}`. A completed run whose result can\'t be read has an `error`.'
    ),
    response_model=None,
    responses={
        200: {"description": "JSON Lines", "content": {JSON_LINES: {"schema": {"type": "string"}}}},
        **problems.responses(UnknownBatch, LedgerUnavailable),
    },
)
async def get_results(batch_id: UUID, deps: Deps) -> Response:
    await batches.get(deps.ledger, batch_id)
    return StreamingResponse(_written(deps, batch_id), media_type=JSON_LINES)


async def _written(deps: Backend, batch_id: UUID) -> AsyncIterator[bytes]:
    """An error from here on can't become a problem document: it cuts off the answer, which its reader notices."""
    page = bytearray()
    async for item in batches.results(deps.ledger, batch_id):
        head = f'{{"id":"{item.id}","state":"{item.state.value}"'.encode()
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
