"""Answers that go on: server-sent events about runs and batches, for a bounded number of readers.

A stream holds nothing but its place: it reads the next page from the ledger once the page before has been sent, so a
slow reader costs no memory, and what it misses of the progress is left out. Lines of the log are read from the store,
for those who ask for them.
"""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import asyncpg
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from backcast.api.run_log import RunLog
from backcast.api.waits import gone
from backcast.api.watching import Watching
from backcast.errors import LedgerUnavailable, StoreUnavailable, TooManyStreams, UnknownBatch, UnknownRun
from backcast.ledger import batches, following
from backcast.ledger.connection import ENDED, REPORTED, Ledger
from backcast.ledger.following import Happening, Known, News, Place
from backcast.models import JSON, Batch, State
from backcast.process.background import OnDemand
from backcast.store import Store

MEDIA_TYPE = "text/event-stream"
COMMENT = 15.0
"""Seconds without an event after which a comment is sent: proxies end connections on which nothing moves."""
PAUSE = 0.25
"""Seconds at least between two looks of a stream at its run."""
BATCH_PAUSE, BURDEN = 1.0, 20.0
"""The same for a batch, which is counted each time; but it may be looked at for a twentieth of the time at most."""
LOG_PAUSE, LOG_ASKED = 0.5, 1.0
"""Seconds between two looks of a stream at the log of its running run, and between two requests to its worker to store
the log: a line is seen within their sum."""
_COMMENT = b":\n\n"
_RETRY = b"retry: 1000\n\n"
"""Milliseconds after which a browser connects again, with its place, to any API process."""
END = "end"
"""The id of the last event: who comes with it needs nothing more."""
_PLACE = re.compile(r"(\d{1,9})(?:\.(r)|\.(\d{1,18})\.(\d{1,9}))?")
_BATCH_PLACE = re.compile(r"(\d{1,16})\.([0-9a-f]{32})")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Stream:
    """One reader."""

    def __init__(self, longest: timedelta) -> None:
        self.known: Known | None = None
        """Of the run that it follows, once it has seen all of it."""
        self.changed = asyncio.Event()
        self.is_over = False
        """Its reader has left, or its time is over, or the process ends."""
        self.until = time.monotonic() + longest.total_seconds()
        self._comment = time.monotonic() + COMMENT

    async def wait(self, seconds: float = COMMENT) -> bytes:
        """Return after a change, or so many seconds; with the comment, if one is due."""
        left = min(seconds, self._comment - time.monotonic(), self.until - time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, left)):
                await self.changed.wait()
        now = time.monotonic()
        self.is_over = self.is_over or now >= self.until
        if now < self._comment:
            return b""
        self._comment = now + COMMENT
        return _COMMENT

    def end(self) -> None:
        self.is_over = True
        self.changed.set()


class Streams:
    """The streams of one process: at most `most` at once."""

    channels: Sequence[str] = (ENDED, REPORTED)

    def __init__(self, ledger: Ledger, store: Store, watching: Watching, *, most: int, longest: timedelta) -> None:
        self._ledger, self._store, self._watching, self._most, self._longest = ledger, store, watching, most, longest
        self._open = set[_Stream]()
        self._logs_read = set[UUID]()
        self._asking = OnDemand("ask for logs", self._ask_for_logs, lambda: LOG_ASKED)
        self._batches = dict[UUID, tuple[float, asyncio.Task[Batch]]]()
        self._stopped = False
        watching.looks.append(self)

    @property
    def is_wanted(self) -> bool:
        return any(stream.known is not None for stream in self._open)

    async def look(self, connection: asyncpg.Connection, *, for_all: bool) -> bool:
        followed = [(stream, stream.known) for stream in self._open if stream.known is not None] if for_all else []
        if followed:
            for index in await following.changed(connection, [known for _, known in followed]):
                followed[index][0].changed.set()
        return bool(followed)

    @property
    def count(self) -> int:
        return len(self._open)

    def stop(self) -> None:
        """End all streams now; their readers go on elsewhere."""
        self._stopped = True
        self._asking.cancel()
        for stream in self._open:
            stream.end()

    async def run(self, request: Request, run_id: UUID, *, with_log: bool) -> Response:
        """Raises `UnknownRun`, `TooManyStreams` or `LedgerUnavailable` before anything is sent."""
        if (last := request.headers.get("last-event-id", "").strip()) == END:
            return Response(status_code=204)
        last, _, of_log = last.partition("~")
        seen, log = _place(last), RunLog(self._store, run_id, of_log) if with_log else None
        first = await following.read(self._ledger, run_id, seen)

        async def events(stream: _Stream) -> AsyncIterator[bytes]:
            async for part in self._follow_run(stream, run_id, first, seen, log):
                yield part.events() if isinstance(part, _Lines) else part

        return self._answer(request, events)

    async def logs(self, request: Request, run_id: UUID, media_type: str) -> Response:
        """The lines of the log only. Raises as `run` does."""
        first, log = await following.read(self._ledger, run_id, following.NOW), RunLog(self._store, run_id)

        async def lines(stream: _Stream) -> AsyncIterator[bytes]:
            async for part in self._follow_run(stream, run_id, first, following.NOW, log):
                if isinstance(part, _Lines):
                    yield part.text
                elif part == _COMMENT:
                    yield b"\n"
                elif part == _RETRY:
                    raise _BrokenOff

        return self._answer(request, lines, media_type)

    async def batch(self, request: Request, batch_id: UUID) -> Response:
        """Raises `UnknownBatch`, `TooManyStreams` or `LedgerUnavailable` before anything is sent."""
        if (last := request.headers.get("last-event-id", "").strip()) == END:
            return Response(status_code=204)
        await self._batch(batch_id)
        return self._answer(request, lambda stream: self._follow_batch(stream, batch_id, _batch_place(last)))

    def _answer(
        self, request: Request, parts: Callable[[_Stream], AsyncIterator[bytes]], media_type: str = MEDIA_TYPE
    ) -> "_Answer":
        if len(self._open) >= self._most or self._stopped:
            raise TooManyStreams(
                f"This process serves {self._most} streams already: try again later, or ask for the run itself, with"
                " `Prefer: wait`."
            )
        self._open.add(stream := _Stream(self._longest))
        return _Answer(request, stream, parts(stream), lambda: self._open.discard(stream), media_type)

    async def _follow_run(
        self, stream: _Stream, run_id: UUID, news: News, seen: Place, log: RunLog | None
    ) -> "AsyncIterator[bytes | _Lines]":
        while True:
            looked = time.monotonic()
            if news.happenings:
                seen = news.happenings[-1].place
                yield b"".join(_text(each, log) for each in news.happenings)
            if news.is_all:
                # The log of an attempt is stored before its end is recorded: what is read from here on is all of it.
                async for part in self._lines(stream, news, log, seen):
                    yield part
                if news.run.state.is_final and not (stream.is_over and log):
                    yield _event(END, "ended", _end(news))
                    return
                stream.known = Known(run_id, news.version, seen)
                self._watching.ask()
                is_live = log is not None and news.run.state is State.RUNNING
                while not (stream.changed.is_set() or stream.is_over):
                    yield await stream.wait(LOG_PAUSE if is_live else COMMENT)
                    if is_live:
                        async for part in self._lines(stream, news, log, seen):
                            yield part
                stream.known = None
                await asyncio.sleep(max(0.0, PAUSE - (time.monotonic() - looked)))
            stream.changed.clear()
            while (more := None if stream.is_over else await self._more(run_id, seen)) is None:
                if stream.is_over:
                    yield _RETRY
                    return
                yield await stream.wait(1.0)
            news = more

    async def _lines(
        self, stream: _Stream, news: News, log: RunLog | None, seen: Place
    ) -> "AsyncIterator[bytes | _Lines]":
        """The lines of the log that are there now, however long the store is away."""
        while log is not None and not stream.is_over:
            if news.run.state is State.RUNNING:
                self._logs_read.add(news.run.id)
                self._asking.ask()
            try:
                async with aclosing(log.lines(news.fence)) as pieces:
                    async for lines in pieces:
                        yield _Lines(lines, seen, log.fence, log.at - len(lines))
                return
            except StoreUnavailable:
                await asyncio.sleep(1.0)
                yield await stream.wait(0.0)

    async def _ask_for_logs(self) -> None:
        runs, self._logs_read = self._logs_read, set[UUID]()
        await following.report_logs_read(self._ledger, runs)

    async def _more(self, run_id: UUID, seen: Place) -> News | None:
        """None while the database is away, or if the run was removed: whoever comes again learns that."""
        with contextlib.suppress(UnknownRun, LedgerUnavailable):
            return await following.read(self._ledger, run_id, seen)
        return None

    async def _batch(self, batch_id: UUID) -> Batch:
        """The batch as it is, or was a second ago: all its streams share the look."""
        at, look = self._batches.get(batch_id, (0.0, None))
        if look is None or time.monotonic() >= at:
            for old in [old for old, (until, _) in self._batches.items() if time.monotonic() >= until]:
                del self._batches[old]
            look = asyncio.create_task(batches.get(self._ledger, batch_id))
            self._batches[batch_id] = time.monotonic() + BATCH_PAUSE, look
        return await asyncio.shield(look)

    async def _follow_batch(self, stream: _Stream, batch_id: UUID, seen: tuple[datetime, UUID]) -> AsyncIterator[bytes]:
        shown: dict[State, int] | None = None
        moved = time.monotonic()
        while True:
            began = time.monotonic()
            try:
                batch = await self._batch(batch_id)
                if batch.states != shown:
                    moved = began
                    yield _event(_batch_id(seen), "states", batch.model_dump_json())
                shown = batch.states
                live = any(batch.states.get(state) for state in (State.QUEUED, State.RUNNING))
                is_over = not live and batch.operation_id is None
                while is_over or began - moved < following.LAG.total_seconds() + 2 * BATCH_PAUSE:
                    page = await following.ended(self._ledger, batch_id, seen, is_over=is_over)
                    if page:
                        moved, seen = began, (page[-1]["finished_at"], page[-1]["id"])
                        runs = [{"id": str(row["id"]), "state": row["state"]} for row in page]
                        yield _event(_batch_id(seen), "runs", json.dumps({"items": runs}))
                    if len(page) < following.ENDED_PAGE:
                        break
                if is_over:
                    yield _event(END, "ended", batch.model_dump_json())
                    return
            except UnknownBatch:
                return
            except LedgerUnavailable:
                pass
            yield await stream.wait(max(BATCH_PAUSE, BURDEN * (time.monotonic() - began)))
            if stream.is_over:
                yield _RETRY
                return


class _Lines(NamedTuple):
    """Lines of a log."""

    text: bytes
    seen: Place
    """Of the events, where the reader is."""
    fence: int
    at: int
    """Bytes of the attempt's log before them."""

    def events(self) -> bytes:
        events, at = list[bytes](), self.at
        for line in self.text.split(b"\n")[:-1]:
            at += len(line) + 1
            events.append(_event(f"{_id(self.seen)}~{self.fence}.{at}", "log", line.decode()))
        return b"".join(events)


class _BrokenOff(Exception):
    """There is more of an answer than was sent."""


class _Answer(Response):
    """Sends the parts of a stream as they come, until there are no more or its reader leaves."""

    def __init__(
        self,
        request: Request,
        stream: _Stream,
        parts: AsyncIterator[bytes],
        closed: Callable[[], object],
        media_type: str,
    ) -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request, self._stream, self._parts, self._closed = request, stream, parts, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # starlette's
        left = asyncio.create_task(gone(self._request))
        left.add_done_callback(lambda _: self._stream.end())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in _none() if scope.get("is_head") else self._parts:
                if left.done():
                    return
                if part:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except _BrokenOff:  # its reader must see that this is not all
            scope["abort"]()  # see `server.py`
        finally:
            left.cancel()
            self._closed()


async def _none() -> AsyncIterator[bytes]:
    return
    yield b""


# Outside of strings JSON may have line breaks, which would end the field. In strings it may have characters at which
# the readers of some languages end a line, Python's among them.
_ON_ONE_LINE = str.maketrans({"\n": " ", "\r": " ", "\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def _event(name_of_place: str, name: str, data: str) -> bytes:
    return f"id: {name_of_place}\nevent: {name}\ndata: {data.translate(_ON_ONE_LINE)}\n\n".encode()


def _text(happening: Happening, log: RunLog | None) -> bytes:
    data = json.dumps(happening.data)
    if happening.raw is not None:
        data = f'{data[:-1]}, "data": {happening.raw}}}'
    of_log = f"~{log.fence}.{log.at}" if log is not None else ""
    return _event(_id(happening.place) + of_log, happening.name, data)


def _end(news: News) -> str:
    """The run, with its result if its row has it."""
    run: JSON = news.run.model_dump_json()
    return f'{{"run": {run}}}' if news.result is None else f'{{"run": {run}, "result": {news.result}}}'


def _id(place: Place) -> str:
    if place.fence == following.RETRYING:
        return f"{place.attempt}.r"
    return str(place.attempt) if place.fence == 0 else f"{place.attempt}.{place.fence}.{place.seq}"


def _place(text: str) -> Place:
    """The place that an id names; the start, if it names none of a run."""
    if (found := _PLACE.fullmatch(text)) is None:
        return following.START
    if found[2]:
        return Place(int(found[1]), following.RETRYING)
    return Place(int(found[1]), int(found[3] or 0), int(found[4] or 0))


def _batch_id(place: tuple[datetime, UUID]) -> str:
    return f"{(place[0] - _EPOCH) // timedelta(microseconds=1)}.{place[1].hex}"


def _batch_place(text: str) -> tuple[datetime, UUID]:
    if (found := _BATCH_PLACE.fullmatch(text)) is None:
        return _EPOCH, UUID(int=0)
    return _EPOCH + timedelta(microseconds=int(found[1])), UUID(found[2])
