"""Reads the lines of a batch as they come: checks each, and keeps the rows of the right ones until all have come.

Its memory does not grow with the lines: what is kept goes to a file, and what is wrong is bounded.
"""

import asyncio
import hashlib
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import Annotated, Any, NamedTuple
from uuid import UUID

from fastapi import Request
from pydantic import Field, TypeAdapter
from pydantic_core import to_json

from backcast.api.body import parse_json, validate
from backcast.api.deps import Backend, Known
from backcast.api.submit import check_input, in_json, late
from backcast.errors import (
    BodyTooLarge,
    ClientError,
    FieldError,
    InvalidInput,
    NoSpace,
    StoreUnavailable,
    UnknownTask,
)
from backcast.ledger import submissions
from backcast.ledger.submissions import New
from backcast.models import JSON, Name, Submission, input_key, uuid7

WRONG = 20
"""Wrong lines that are reported; after them the rest is not read, unless it is to go on without them, or may repeat an
earlier batch. Also the errors of a line that are kept."""
KEPT = 1000
"""Skipped lines whose errors are kept."""
_TURN = 0.01
"""Seconds after which other requests have a turn, once a line is read."""
_PUTS = 8
"""Large inputs that are stored at the same time."""
_IN_MEMORY = 1024 * 1024
"""Bytes of rows: more of them go to a file. Also the most that one piece of them has, but for its last row."""
_ROW = TypeAdapter(New)


class Rows:
    """The rows of a batch, on the disk unless they are few. Raises `NoSpace` when it is full."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  # without a name: a kill leaves nothing
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, row: New) -> None:
        try:
            self._file.write(to_json(row) + b"\n")
        except OSError as error:
            raise NoSpace("The API has no room for the batch while it arrives.", reason=str(error)) from None
        self._count += 1

    def pieces(self, most: int) -> Iterator[list[New]]:
        """Up to so many at once, in their order; from the first one at each call."""
        self._file.seek(0)
        piece, size = list[New](), 0
        for line in self._file:
            piece.append(_ROW.validate_json(line))
            size += len(line)
            if len(piece) == most or size > _IN_MEMORY:
                yield piece
                piece, size = [], 0
        if piece:
            yield piece

    def close(self) -> None:
        self._file.close()


class _Line(Submission):
    task: Name
    custom_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """The caller's name for the line, one of its own in the batch; kept as the label `custom_id`."""


class _Wrong(NamedTuple):
    number: int
    custom_id: str | None
    code: str
    detail: str
    errors: tuple[FieldError, ...]


class Reader:
    """Makes rows from lines. Ids rise strictly with the lines, so that their order is the order of the batch."""

    def __init__(self, backend: Backend, batch_id: UUID, given: dict[str, JSON]) -> None:
        self._backend = backend
        self._batch_id = batch_id
        self._given = given
        self._last = 0
        self._known: dict[str, Known | ClientError] = {}
        self._puts: set[asyncio.Task[None]] = set()
        self._large: list[str] = []
        """The keys of stored inputs. The orphan sweep removes those of lines that make no run."""
        self._stored_until: datetime | None = None
        self._custom_id: str | None = None
        self._named: dict[bytes, int] = {}
        """The first line of each `custom_id`, by its digest."""
        self._wrong: list[_Wrong] = []
        """The first ones."""
        self.wrong = 0
        self.rows = Rows()
        self.owner: str | None = None

    async def read(self, number: int, line: bytes) -> None:
        self._custom_id = None
        try:
            await self._read(number, line)
        except ClientError as error:
            self.wrong += 1
            if len(self._wrong) < KEPT:
                self._wrong.append(_Wrong(number, self._custom_id, error.code, error.detail, error.errors[:WRONG]))

    async def _read(self, number: int, line: bytes) -> None:
        given = parse_json(line)
        if isinstance(given, dict) and isinstance(named := given.get("custom_id"), str):
            self._custom_id = named[:200]
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
        if (refusal := late(found)) is not None:
            raise refusal
        body = in_json(found.input)
        self._last = max(uuid7().int, self._last + 1)
        run_id = UUID(int=self._last)
        large = input_key(run_id) if len(body) > submissions.INLINE_INPUT else None
        if large is not None:
            await self._store(large, body)
        self.rows.add(
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

    def _name(self, number: int, found: _Line) -> None:
        if found.custom_id is None:
            return
        digest = hashlib.blake2b(found.custom_id.encode(), digest_size=16).digest()
        if (first := self._named.setdefault(digest, number)) != number:
            why = f"line {first + 1} has it already"
        elif found.metadata.get("custom_id", found.custom_id) != found.custom_id:
            why = "the metadata has another one"
        else:
            labels: dict[str, JSON] = {**found.metadata, "custom_id": found.custom_id}
            found.metadata = validate(Submission, {"metadata": labels}).metadata  # as its retry will be checked
            return
        raise InvalidInput(f"/custom_id: {why}.", errors=(FieldError("/custom_id", why),))

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
        self._large.append(key)
        self._puts.add(asyncio.create_task(self._backend.store.put(key, body)))

    async def stored(self) -> None:
        """Wait until every large input is in the store. Raises `StoreUnavailable`."""
        await asyncio.gather(*self._puts)

    async def drop(self) -> None:
        """Delete the large inputs of a batch that is not recorded. The orphan sweep removes any that stay behind."""
        await asyncio.gather(*self._puts, return_exceptions=True)  # a cancelled one may still be written
        try:
            await self._backend.store.delete(self._large)
        except StoreUnavailable:
            return

    def check(self) -> None:
        """Raises `InvalidInput` that names the wrong lines."""
        if self._wrong:
            errors = tuple(
                FieldError(f"/{wrong.number}{field.pointer}", field.detail)
                for wrong in self._wrong[:WRONG]
                for field in (wrong.errors or (FieldError("", wrong.detail),))
            )
            first = self._wrong[0]
            more = f" So are {self.wrong - 1} more lines." if self.wrong > 1 else ""
            raise InvalidInput(f"Line {first.number + 1} is wrong: {first.detail}{more}", errors=errors)
        if not len(self.rows):
            raise InvalidInput("The batch is empty: send one run per line.")

    def errors(self) -> str | None:
        """JSON Lines about the first wrong lines."""
        lines = [
            to_json(
                {
                    "line": wrong.number + 1,
                    "custom_id": wrong.custom_id,
                    "code": wrong.code,
                    "detail": wrong.detail,
                    "errors": [{"pointer": each.pointer, "detail": each.detail} for each in wrong.errors],
                }
            ).decode()
            for wrong in self._wrong
        ]
        return "\n".join(lines) + "\n" if lines else None


async def lines(request: Request, digest: Any, longest: int) -> AsyncIterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 0. Other requests have a turn every `_TURN`, and at every
    piece of the body."""
    number, line, began = 0, bytearray(), time.monotonic()
    async for piece in request.stream():
        digest.update(piece)
        first, *others = piece.split(b"\n")
        line += first
        for other in others:
            if line.strip():
                yield number, bytes(line)
            number, line = number + 1, bytearray(other)
            if time.monotonic() - began > _TURN:
                await asyncio.sleep(0)
                began = time.monotonic()
        if len(line) > longest:
            raise BodyTooLarge(f"A line may have {longest} bytes: send less, or send a link to the data instead.")
        await asyncio.sleep(0)
    if line.strip():
        yield number, bytes(line)
