"""Batches: many runs in one request, as JSON Lines. All of them are accepted, or none; errors name their lines.

Lines are read, checked and dropped as they come, a few at a time, so that other requests go on meanwhile.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import datetime
from operator import itemgetter
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
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
LINES: dict[int | str, dict[str, Any]] = {
    200: {"description": "JSON Lines", "content": {JSON_LINES: {"schema": {"type": "string"}}}}
}
_KINDS = (JSON_LINES, "application/x-ndjson", "application/ndjson", "application/x-jsonlines")
_SLICE = 100
"""Lines after which other requests have a turn: some milliseconds."""
_WRONG = 20
"""Wrong lines that are reported; after them the rest is not read."""
_KEPT = 1000
"""Skipped lines whose errors are kept."""
_LISTED = 100
"""Batches in the list."""
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
    custom_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """The caller's name for the line, one of its own in the batch; kept as the label `custom_id`."""


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
        self._late: list[tuple[int, ClientError, UUID]] = []
        self.dropped: list[str] = []
        """Stored inputs of lines that make no run; the orphan sweep removes them, unless the whole batch is dropped."""
        self.names: dict[int, str] = {}
        """The `custom_id` of the wrong lines that have a usable one."""
        self._named: dict[str, int] = {}

    async def read(self, number: int, line: bytes) -> None:
        try:
            found = await self._read(number, line)
        except ClientError as error:
            self.wrong.append((number, error))
        else:
            if (error := late(found)) is not None:
                self._late.append((number, error, self.rows[-1].id))

    async def _read(self, number: int, line: bytes) -> Submission:
        given = parse_json(line)
        if isinstance(given, dict) and isinstance(named := given.get("custom_id"), str):
            self.names[number] = named[:200]
        found = validate(_Line, self._given | given if isinstance(given, dict) else given)
        self._name(number, found)
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

    def _name(self, number: int, found: _Line) -> None:
        if found.custom_id is None:
            return
        if (first := self._named.setdefault(found.custom_id, number)) != number:
            why = f"line {first + 1} has it already"
        elif found.metadata.get("custom_id", found.custom_id) != found.custom_id:
            why = "the metadata has another one"
        else:
            found.metadata = found.metadata | {"custom_id": found.custom_id}
            return
        raise InvalidInput(f"/custom_id: {why}.", errors=(FieldError("/custom_id", why),))

    def skip(self) -> tuple[int, str | None]:
        """How many lines are wrong, and JSON Lines about the first ones."""
        lines = [
            to_json(
                {
                    "line": number,
                    "custom_id": self.names.get(number),
                    "code": error.code,
                    "detail": error.detail,
                    "errors": [{"pointer": each.pointer, "detail": each.detail} for each in error.errors],
                }
            ).decode()
            for number, error in self.wrong[:_KEPT]
        ]
        return len(self.wrong), "\n".join(lines) + "\n" if lines else None

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

    @property
    def has_late(self) -> bool:
        return bool(self._late)

    async def stored(self) -> None:
        """Wait until every large input is in the store. Raises `StoreUnavailable`."""
        await asyncio.gather(*self._puts)

    async def drop(self) -> None:
        """Delete the large inputs of a batch that is not recorded. The orphan sweep removes any that stay behind."""
        await asyncio.gather(*self._puts, return_exceptions=True)  # a cancelled one may still be written
        try:
            keys = [row.input_key for row in self.rows if row.input_key is not None]
            await self._backend.store.delete([*keys, *self.dropped])
        except StoreUnavailable:
            return

    def refuse_late(self) -> None:
        """Lines whose deadline has passed are wrong, as this is no repetition of a batch."""
        late_runs = {run for _, _, run in self._late}
        self.dropped += [row.input_key for row in self.rows if row.id in late_runs and row.input_key is not None]
        self.rows = [row for row in self.rows if row.id not in late_runs]
        self.wrong = sorted([*self.wrong, *((number, error) for number, error, _ in self._late)], key=itemgetter(0))

    def check(self) -> None:
        """Raises `InvalidInput` that names the wrong lines."""
        if self.wrong:
            errors = tuple(
                FieldError(f"/{number}{field.pointer}", field.detail)
                for number, error in self.wrong[:_WRONG]
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
        " batch. Wrong lines are named by `errors[].pointer`: `/<line, from 0>/<field>`, for up to 20 lines. With"
        " `on_error=skip` they make no run and the others do, unless all are wrong. A `custom_id` names a line: it is"
        " in its result or error, and a label of its run (`metadata.custom_id`)."
    ),
    response_model=Batch,
    responses=SUBMIT_PROBLEMS,
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
    reader = _Reader(deps, batch_id, given)
    kept = False
    try:
        async for number, line in _lines(request, digest, deps.limits.max_body):
            if len(reader.rows) >= deps.limits.max_batch:
                raise BodyTooLarge(f"A batch may have {deps.limits.max_batch} runs: send more batches.")
            await reader.read(number, line)
            if len(reader.wrong) >= _WRONG and not skips:
                break
        if reader.has_late and not (key and reader.owner and await batches.has_key(deps.ledger, reader.owner, key)):
            reader.refuse_late()
        if not (skips and reader.rows):
            reader.check()
        assert reader.owner is not None
        skipped, errors = reader.skip()
        await _admit(deps, reader.owner, len(reader.rows), key)
        await reader.stored()
        kept = True  # from here on it may be recorded, even if no answer reaches us
        submitted = await batches.submit(
            deps.ledger,
            batch_id,
            reader.owner,
            reader.rows,
            key=key,
            request_hash=digest.digest(),
            skipped=skipped,
            errors=errors,
        )
        kept = submitted.fresh
    finally:
        if not kept:
            await reader.drop()
    headers = {"Location": f"{PATH}/{submitted.batch.id}", "Retry-After": "1"}
    if submitted.fresh:
        deps.metrics.submitted(submitted.batch.size)
    else:
        headers["Idempotent-Replayed"] = "true"
    return Response(submitted.batch.model_dump_json(), 202, headers, "application/json")


async def _admit(deps: Backend, owner: str, runs: int, key: str | None) -> None:
    try:
        await deps.admission.admit(owner, runs)
    except TooManyWaiting:
        if key is None or not await batches.has_key(deps.ledger, owner, key):
            raise


class BatchList(BaseModel):
    items: list[Batch]


@router.get(
    "",
    summary="List the latest batches",
    description="The newest first, at most 100, without their `states`: each batch has them.",
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
        ' `{"line" (from 0), "custom_id", "code", "detail", "errors": [{"pointer", "detail"}]}`.'
    ),
    response_model=None,
    responses=LINES | problems.responses(UnknownBatch, LedgerUnavailable),
)
async def get_errors(batch_id: UUID, deps: Deps) -> Response:
    return Response(await batches.errors(deps.ledger, batch_id), media_type=JSON_LINES)


class BatchResult(BaseModel):
    """A line of the results: with `result` if the run completed, with `error` if there will be no result."""

    id: UUID
    state: str
    custom_id: str | None = None
    metadata: dict[str, str] = {}
    result: JSON = None
    error: dict[str, str] | None = None


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
