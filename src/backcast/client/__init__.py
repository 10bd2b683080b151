"""A typed client of the HTTP interface, synchronous and asynchronous: two classes that perform the same exchanges.

Every request may be sent twice without harm, submissions by their Idempotency-Key, so an outage is waited out for
`patience` seconds. An option that a method does not take is a TypeError, as for any Python function.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, TypeVar, Unpack, overload
from uuid import UUID

import httpx

from backcast.client import batches, casting, levers, runs, selection
from backcast.client.batches import BatchResult
from backcast.client.casting import CastManyOptions, CastResult, Rows
from backcast.client.events import Event, Following
from backcast.client.performing import DEFAULT_URL, Awaiting, Blocking, method
from backcast.client.runs import LogLine, Progress, Waiting, raise_for_state
from backcast.client.selection import Filters, PageRequest, RunPage
from backcast.client.wire import to_httpx
from backcast.errors import ConfigurationError, Unavailable, WaitTimeout
from backcast.models import CAST, JSON, Run
from backcast.variables import KEY_VARIABLE

__all__ = [
    "CAST",
    "DEFAULT_URL",
    "AsyncClient",
    "BatchResult",
    "CastResult",
    "Client",
    "Event",
    "Filters",
    "LogLine",
    "Progress",
    "RunPage",
    "WaitTimeout",
    "authorization",
    "raise_for_state",
]

T = TypeVar("T")


class _Methods:
    """What both clients do with one exchange; the signatures and docstrings are those of the exchanges."""

    submit = method(runs.submit)
    get = method(runs.get)
    wait = method(runs.wait)
    result = method(runs.result)
    input = method(runs.kept_input)
    why = method(runs.why)
    logs = method(runs.logs)
    attempts = method(runs.attempts)
    retry = method(runs.retry)
    cancel = method(runs.cancel)

    submit_many = method(batches.submit_many)
    submit_lines = method(batches.submit_lines)
    batch = method(batches.get)
    batch_results = method(batches.results)
    batch_errors = method(batches.errors)
    cancel_batch = method(batches.cancel)
    retry_batch = method(batches.retry)
    latest_batches = method(batches.latest)

    retry_many = method(selection.retry_many)
    cancel_many = method(selection.cancel_many)
    count_to_retry = method(selection.count_to_retry)
    count_to_cancel = method(selection.count_to_cancel)
    operation = method(selection.operation)
    stop_operation = method(selection.stop_operation)

    task = method(levers.task)
    tasks = method(levers.tasks)
    lane = method(levers.lane)
    lanes = method(levers.lanes)
    limit_lane = method(levers.limit_lane)
    lift_lane = method(levers.lift_lane)
    pauses = method(levers.pauses)
    pause = method(levers.pause)
    resume = method(levers.resume)
    drain = method(levers.drain)

    counts = method(levers.counts)
    pools = method(levers.pools)
    workers = method(levers.workers)
    page = method(selection.page)


class Client(_Methods, Blocking):
    """The service at `url`. `headers` go with every request; `patience` is in seconds."""

    @overload
    def cast(self, data: JSON, target: type[T], instructions: str | None = None, **waiting: Unpack[Waiting]) -> T: ...
    @overload
    def cast(
        self, data: JSON, target: str | Mapping[str, JSON], instructions: str | None = None, **waiting: Unpack[Waiting]
    ) -> JSON: ...
    def cast(self, data: JSON, target: Any, instructions: str | None = None, **waiting: Unpack[Waiting]) -> Any:
        """Turn `data` into `target`: a name (`"list[str]"`), a JSON Schema, or a Python type, whose value is returned.

        Raises:
            RunError: the run failed, expired or was cancelled; `code` names the reason.
            WaitTimeout: it takes longer than `timeout` seconds.
            pydantic.ValidationError: the Python type has a validator of its own that refuses the result.
        """
        return self._perform(casting.cast(data, target, instructions, waiting))

    @overload
    def cast_many(
        self, rows: Iterable[JSON], target: type[T], instructions: str | None = None, **options: Unpack[CastManyOptions]
    ) -> Iterator[CastResult[T]]: ...
    @overload
    def cast_many(
        self,
        rows: Iterable[JSON],
        target: str | Mapping[str, JSON],
        instructions: str | None = None,
        **options: Unpack[CastManyOptions],
    ) -> Iterator[CastResult[JSON]]: ...
    def cast_many(
        self, rows: Iterable[JSON], target: Any, instructions: str | None = None, **options: Unpack[CastManyOptions]
    ) -> Iterator[CastResult[Any]]:
        """Cast every row, many at a time, and yield the results in the order of the rows. A row that fails has an
        `error`, and the others go on. At most a thousand rows are under way, so `rows` may be a generator.
        `progress(ended, submitted)` is called with the number of rows, every now and then. Raises `InvalidInput` if
        none of the first rows is taken: the target is wrong."""
        return self._cast_many(Rows(iter(rows), target, instructions, **options))

    def _cast_many(self, rows: Rows) -> Iterator[CastResult[Any]]:
        while some := self._perform(rows.some()):
            yield from some

    def stream(self, run_id: UUID | str, *, logs: bool = False) -> Iterator[Event]:
        """What happens to a run, from its submission to its end: each state once, progress, what the task emits, and
        the lines of its log if asked. A lost connection is made again."""
        return self._stream(Following("runs", run_id, logs=logs))

    def follow_logs(self, run_id: UUID | str) -> Iterator[LogLine]:
        """What the code of a run logs and prints, from its start to its end; lines come about 2 s late."""
        for event in self.stream(run_id, logs=True):
            if event.name == "log":
                yield LogLine.model_validate(event.data, extra="ignore")

    def stream_batch(self, batch_id: UUID | str) -> Iterator[Event]:
        """As `stream`: the batch's counts by state, and its runs as they end."""
        return self._stream(Following("batches", batch_id))

    def _stream(self, following: Following) -> Iterator[Event]:
        while not following.is_over:
            try:
                with self._http.stream(**to_httpx(following.ask())) as answer:
                    if answer.status_code != 200:
                        answer.read()
                    following.opened(answer)
                    for line in answer.iter_lines():
                        if event := following.line(line):
                            yield event
            except (httpx.TransportError, Unavailable) as error:
                time.sleep(following.lost(error))
            else:
                time.sleep(0 if following.is_over else following.pause)

    def list(self, *, limit: int | None = None, **filters: Unpack[Filters]) -> Iterator[Run]:
        """Runs, newest first; pages are fetched as they are read."""
        return self._pages(selection.first_page(filters, limit))

    def _pages(self, ask: PageRequest | None) -> Iterator[Run]:
        while ask:
            found, ask = self._perform(selection.next_page(ask))
            yield from found


class AsyncClient(_Methods, Awaiting):
    """`Client` for asyncio; the methods are the same. `transport` takes the place of the network, as httpx's does."""

    @overload
    async def cast(
        self, data: JSON, target: type[T], instructions: str | None = None, **waiting: Unpack[Waiting]
    ) -> T: ...
    @overload
    async def cast(
        self, data: JSON, target: str | Mapping[str, JSON], instructions: str | None = None, **waiting: Unpack[Waiting]
    ) -> JSON: ...
    async def cast(self, data: JSON, target: Any, instructions: str | None = None, **waiting: Unpack[Waiting]) -> Any:
        return await self._perform(casting.cast(data, target, instructions, waiting))

    @overload
    def cast_many(
        self, rows: Iterable[JSON], target: type[T], instructions: str | None = None, **options: Unpack[CastManyOptions]
    ) -> AsyncIterator[CastResult[T]]: ...
    @overload
    def cast_many(
        self,
        rows: Iterable[JSON],
        target: str | Mapping[str, JSON],
        instructions: str | None = None,
        **options: Unpack[CastManyOptions],
    ) -> AsyncIterator[CastResult[JSON]]: ...
    def cast_many(
        self, rows: Iterable[JSON], target: Any, instructions: str | None = None, **options: Unpack[CastManyOptions]
    ) -> AsyncIterator[CastResult[Any]]:
        return self._cast_many(Rows(iter(rows), target, instructions, **options))

    async def _cast_many(self, rows: Rows) -> AsyncIterator[CastResult[Any]]:
        while some := await self._perform(rows.some()):
            for result in some:
                yield result

    def stream(self, run_id: UUID | str, *, logs: bool = False) -> AsyncIterator[Event]:
        return self._stream(Following("runs", run_id, logs=logs))

    async def follow_logs(self, run_id: UUID | str) -> AsyncIterator[LogLine]:
        async for event in self.stream(run_id, logs=True):
            if event.name == "log":
                yield LogLine.model_validate(event.data, extra="ignore")

    def stream_batch(self, batch_id: UUID | str) -> AsyncIterator[Event]:
        return self._stream(Following("batches", batch_id))

    async def _stream(self, following: Following) -> AsyncIterator[Event]:
        while not following.is_over:
            try:
                async with self._http.stream(**to_httpx(following.ask())) as answer:
                    if answer.status_code != 200:
                        await answer.aread()
                    following.opened(answer)
                    async for line in answer.aiter_lines():
                        if event := following.line(line):
                            yield event
            except (httpx.TransportError, Unavailable) as error:
                await asyncio.sleep(following.lost(error))
            else:
                await asyncio.sleep(0 if following.is_over else following.pause)

    def list(self, *, limit: int | None = None, **filters: Unpack[Filters]) -> AsyncIterator[Run]:
        return self._pages(selection.first_page(filters, limit))

    async def _pages(self, ask: PageRequest | None) -> AsyncIterator[Run]:
        while ask:
            found, ask = await self._perform(selection.next_page(ask))
            for run in found:
                yield run


def authorization(key: str | None) -> dict[str, str]:
    """The `headers` that show this key to the service, the first one of several with commas; none without a key.
    Raises `ConfigurationError`, without the key."""
    if not key:
        return {}
    first = key.split(",")[0].strip()
    if not (first.isascii() and first.isprintable()):
        raise ConfigurationError(f"The key ({KEY_VARIABLE}) can't be sent: a key has printable ASCII characters only.")
    return {"Authorization": f"Bearer {first}"}
