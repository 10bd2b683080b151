"""A typed client of the HTTP interface, synchronous and asynchronous: two classes that perform the same exchanges.

Every request may be sent twice without harm, submissions by their Idempotency-Key, so an outage is waited out for
`patience` seconds. An option that a method does not take is a TypeError, as for any Python function.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, Never, Self, TypeVar, Unpack, overload
from uuid import UUID

import httpx

from backcast.client import exchanges
from backcast.client.events import Event, Following
from backcast.client.exchanges import (
    BatchResult,
    CastResult,
    Filters,
    LogLine,
    Progress,
    RunPage,
    Waiting,
    raise_for_state,
)
from backcast.client.wire import Ask, Flow, SubmitOptions, connection, to_httpx
from backcast.errors import Unavailable, WaitTimeout, refuse_unknown
from backcast.models import (
    CAST,
    JSON,
    Attempts,
    Batch,
    Counts,
    Lane,
    Limits,
    Matched,
    Operation,
    Pause,
    PauseKind,
    Pool,
    Run,
    Submission,
    TaskType,
    Why,
    Within,
    Worker,
)

__all__ = [
    "CAST",
    "DEFAULT_URL",
    "AsyncClient",
    "BatchResult",
    "CastResult",
    "Client",
    "Event",
    "LogLine",
    "Progress",
    "RunPage",
    "WaitTimeout",
    "authorization",
    "raise_for_state",
]

DEFAULT_URL = "http://127.0.0.1:8000"
_ROWS, _BATCHES = 100, 10
"""Rows that `cast_many` sends in one batch, and batches that are under way: results come often, and workers have enough
to do."""

T = TypeVar("T")


class Client:
    """The service at `url`. `headers` go with every request; `patience` is in seconds."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        headers: Mapping[str, str] | None = None,
        patience: float = 10.0,
        **unknown: Never,
    ) -> None:
        refuse_unknown("Client", unknown, ("headers", "patience"))
        self._patience = patience
        self._http = httpx.Client(**connection(url, headers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(
        self,
        task: str,
        submission: Submission | Mapping[str, JSON],
        *,
        key: str | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Run:
        """Queue a run of `task`. A mapping is the task's input; `options` set the other fields of the submission.

        `key` is the Idempotency-Key; one is made up when none is given.
        """
        return self._perform(exchanges.submit(task, submission, options, key, self._patience))

    def submit_many(
        self,
        task: str,
        submissions: Iterable[Submission | Mapping[str, JSON]],
        *,
        key: str | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Batch:
        """Queue a run of `task` for each submission, all or none, with one request; `options` hold for every one."""
        return self._perform(exchanges.submit_many(task, submissions, options, key, self._patience))

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
        return self._perform(exchanges.cast(data, target, instructions, waiting, self._patience))

    @overload
    def cast_many(
        self, rows: Iterable[JSON], target: type[T], instructions: str | None = None, **options: Unpack[SubmitOptions]
    ) -> Iterator[CastResult[T]]: ...
    @overload
    def cast_many(
        self,
        rows: Iterable[JSON],
        target: str | Mapping[str, JSON],
        instructions: str | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Iterator[CastResult[JSON]]: ...
    def cast_many(
        self, rows: Iterable[JSON], target: Any, instructions: str | None = None, **options: Unpack[SubmitOptions]
    ) -> Iterator[CastResult[Any]]:
        """Cast every row, many at a time, and yield the results in the order of the rows. A row that fails has an
        `error`, and the others go on. At most a thousand rows are under way, so `rows` may be a generator."""
        refuse_unknown("cast_many", options, ("instructions", *SubmitOptions.__annotations__))
        return self._cast_many(iter(rows), exchanges.Casting(target, instructions), options)

    def _cast_many(
        self, rows: Iterator[JSON], casting: exchanges.Casting, options: SubmitOptions
    ) -> Iterator[CastResult[Any]]:
        batches = deque[UUID]()
        while True:
            while len(batches) < _BATCHES and (some := list(islice(rows, _ROWS))):
                batches.append(self._perform(casting.submit_many(some, options, self._patience)).id)
            if not batches:
                return
            yield from self._perform(casting.results(batches.popleft(), self._patience))

    def get(self, run_id: UUID | str) -> Run:
        return self._perform(exchanges.get(run_id, self._patience))

    def result(self, run_id: UUID | str) -> JSON:
        """The run's result.

        Raises:
            NotFinished, NoResult, ResultGone: there is none yet, there will be none, there was one.
        """
        return self._perform(exchanges.result(run_id, self._patience))

    def wait(self, run_id: UUID | str, **waiting: Unpack[Waiting]) -> Run:
        """The run once it has ended, however it ended; `raise_for_state` turns a bad end into an error.

        Raises:
            WaitTimeout: it takes longer than `timeout` seconds.
        """
        return self._perform(exchanges.wait(run_id, waiting, self._patience))

    def stream(self, run_id: UUID | str, *, logs: bool = False) -> Iterator[Event]:
        """What happens to a run, from its submission to its end: each state once, progress, what the task emits, and
        the lines of its log if asked. A lost connection is made again."""
        return self._stream(Following("runs", run_id, logs=logs))

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

    def why(self, run_id: UUID | str) -> Why:
        """Where a run is, and what it waits for."""
        return self._perform(exchanges.why(run_id, self._patience))

    def logs(self, run_id: UUID | str) -> Sequence[LogLine]:
        """What the code of a run has logged and printed so far; lines come about 10 s late."""
        return self._perform(exchanges.logs(run_id, self._patience))

    def follow_logs(self, run_id: UUID | str) -> Iterator[LogLine]:
        """What the code of a run logs and prints, from its start to its end; lines come about 2 s late."""
        for event in self.stream(run_id, logs=True):
            if event.name == "log":
                yield LogLine.model_validate(event.data, extra="ignore")

    def retry_many(self, *, key: str | None = None, **chosen: Unpack[exchanges.Chosen]) -> Operation:
        """Repeat all ended runs that match, the failed and expired ones unless `state` is given. The service works
        through them; `operation` shows how far it has come."""
        return self._perform(exchanges.many("retry", chosen, key, self._patience))

    def cancel_many(self, *, key: str | None = None, **chosen: Unpack[exchanges.Chosen]) -> Operation:
        """Cancel all runs that match and have not ended."""
        return self._perform(exchanges.many("cancel", chosen, key, self._patience))

    def count_to_retry(self, **chosen: Unpack[exchanges.Chosen]) -> Matched:
        """How many runs `retry_many` would repeat."""
        return self._perform(exchanges.count_many("retry", chosen, self._patience))

    def count_to_cancel(self, **chosen: Unpack[exchanges.Chosen]) -> Matched:
        """How many runs `cancel_many` would cancel."""
        return self._perform(exchanges.count_many("cancel", chosen, self._patience))

    def operation(self, operation_id: UUID | str) -> Operation:
        return self._perform(exchanges.operation("GET", operation_id, "", self._patience))

    def stop_operation(self, operation_id: UUID | str) -> Operation:
        """Let it go no further; what it has done stays done."""
        return self._perform(exchanges.operation("POST", operation_id, "/cancel", self._patience))

    def retry_batch(self, batch_id: UUID | str, *, key: str | None = None) -> Operation:
        """Repeat the failed and expired runs of a batch, as a batch of their own: the operation's `batch_id`."""
        return self._perform(exchanges.retry_batch(batch_id, key, self._patience))

    def input(self, run_id: UUID | str) -> JSON:
        """The input that a run was submitted with."""
        return self._perform(exchanges.kept_input(run_id, self._patience))

    def attempts(self, run_id: UUID | str) -> Attempts:
        return self._perform(exchanges.attempts(run_id, self._patience))

    def retry(self, run_id: UUID | str, *, key: str | None = None, **changes: Unpack[exchanges.RetryChanges]) -> Run:
        """A new run that repeats an ended one, with its input or what `changes` has. `key` as in `submit`."""
        return self._perform(exchanges.retry(run_id, changes, key, self._patience))

    def cancel(self, run_id: UUID | str) -> Run:
        return self._perform(exchanges.cancel(run_id, self._patience))

    def task(self, name: str) -> TaskType:
        return self._perform(exchanges.task(name, self._patience))

    def tasks(self) -> Sequence[TaskType]:
        return self._perform(exchanges.tasks(self._patience))

    def batch(self, batch_id: UUID | str) -> Batch:
        """A batch, with its runs counted by state; `list(batch=…)` has the runs."""
        return self._perform(exchanges.batch("GET", batch_id, "", self._patience))

    def submit_lines(
        self,
        lines: bytes,
        *,
        task: str | None = None,
        owner: str | None = None,
        on_error: Literal["reject", "skip"] = "reject",
        key: str | None = None,
    ) -> Batch:
        """Queue the runs of JSON Lines, as `POST /v1/batches` takes them; `task` and `owner` hold for lines that name
        none. `skip` goes on without the wrong lines: `batch_errors` has the reasons."""
        params = {"task": task, "owner": owner, "on_error": on_error}
        return self._perform(exchanges.submit_lines(lines, params, key, self._patience))

    def batch_errors(self, batch_id: UUID | str) -> Sequence[JSON]:
        """The errors of the first 1,000 skipped lines: `line` (from 0), `custom_id`, `code`, `detail`, `errors`."""
        return self._perform(exchanges.batch_errors(batch_id, self._patience))

    def batch_results(self, batch_id: UUID | str) -> Sequence[BatchResult]:
        """The runs of a batch with their results, in the order of submission, ended or not."""
        return self._perform(exchanges.batch_results(batch_id, self._patience))

    def cancel_batch(self, batch_id: UUID | str) -> Batch:
        """Cancel every run of the batch that has not ended."""
        return self._perform(exchanges.batch("POST", batch_id, "/cancel", self._patience))

    def lanes(self) -> Sequence[Lane]:
        """The lanes that have limits."""
        return self._perform(exchanges.lanes(self._patience))

    def lane(self, name: str) -> Lane:
        return self._perform(exchanges.lane("GET", name, None, self._patience))

    def limit_lane(self, name: str, limits: Limits) -> Lane:
        """Replace the limits of a lane."""
        return self._perform(exchanges.lane("PUT", name, limits, self._patience))

    def lift_lane(self, name: str) -> None:
        """Lift the limits of a lane; runs that wait for the lane go on."""
        self._perform(exchanges.lift_lane(name, self._patience))

    def pauses(self) -> Sequence[Pause]:
        """What is paused."""
        return self._perform(exchanges.pauses(self._patience))

    def pause(self, kind: PauseKind | str, name: str, **options: Unpack[exchanges.PauseOptions]) -> Pause:
        """Start nothing new of a `"task"`, `"lane"` or `"pool"`, of what is queued already neither."""
        return self._perform(exchanges.pause(kind, name, options, self._patience))

    def resume(self, kind: PauseKind | str, name: str) -> None:
        """End a pause; what is not paused stays as it is."""
        self._perform(exchanges.resume(kind, name, self._patience))

    def counts(self, within: Within | str = Within.HOUR) -> Counts:
        """How many runs were submitted and have ended in the last `"hour"` or `"day"`."""
        return self._perform(exchanges.counts(within, self._patience))

    def pools(self) -> Sequence[Pool]:
        """The pools, with what waits in them and who works on it."""
        return self._perform(exchanges.pools(self._patience))

    def workers(self) -> Sequence[Worker]:
        """The workers, the newest first; those that are silent are listed until they are removed."""
        return self._perform(exchanges.workers(self._patience))

    def drain(self, worker_id: UUID | str) -> None:
        """Ask a worker to claim nothing more, and to end once its runs have."""
        self._perform(exchanges.drain(worker_id, self._patience))

    def list(self, *, limit: int | None = None, **filters: Unpack[Filters]) -> Iterator[Run]:
        """Runs, newest first; pages are fetched as they are read."""
        return self._pages(exchanges.first_page(filters, limit))

    def page(self, *, limit: int = 50, cursor: UUID | str | None = None, **filters: Unpack[Filters]) -> RunPage:
        """One page of `list`; `next_cursor` leads to the next one."""
        return self._perform(exchanges.run_page(filters, limit, cursor, self._patience))

    def _pages(self, ask: exchanges.PageRequest | None) -> Iterator[Run]:
        while ask:
            runs, ask = self._perform(exchanges.page(ask, self._patience))
            yield from runs

    def _perform(self, flow: Flow[T]) -> T:
        got = None
        try:
            while True:
                step = flow.send(got)
                if isinstance(step, Ask):
                    try:
                        got = self._http.request(**to_httpx(step))
                    except httpx.TransportError as error:
                        got = error
                else:
                    got = time.sleep(step)
        except StopIteration as end:
            return end.value


class AsyncClient:
    """`Client` for asyncio; the methods are the same. `transport` takes the place of the network, as httpx's does."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        headers: Mapping[str, str] | None = None,
        patience: float = 10.0,
        transport: httpx.AsyncBaseTransport | None = None,
        **unknown: Never,
    ) -> None:
        refuse_unknown("AsyncClient", unknown, ("headers", "patience", "transport"))
        self._patience = patience
        way: Any = connection(url, headers) if transport is None else {"base_url": url, "headers": headers}
        self._http = httpx.AsyncClient(**way, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def submit(
        self,
        task: str,
        submission: Submission | Mapping[str, JSON],
        *,
        key: str | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Run:
        return await self._perform(exchanges.submit(task, submission, options, key, self._patience))

    async def submit_many(
        self,
        task: str,
        submissions: Iterable[Submission | Mapping[str, JSON]],
        *,
        key: str | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Batch:
        return await self._perform(exchanges.submit_many(task, submissions, options, key, self._patience))

    @overload
    async def cast(
        self, data: JSON, target: type[T], instructions: str | None = None, **waiting: Unpack[Waiting]
    ) -> T: ...
    @overload
    async def cast(
        self, data: JSON, target: str | Mapping[str, JSON], instructions: str | None = None, **waiting: Unpack[Waiting]
    ) -> JSON: ...
    async def cast(self, data: JSON, target: Any, instructions: str | None = None, **waiting: Unpack[Waiting]) -> Any:
        return await self._perform(exchanges.cast(data, target, instructions, waiting, self._patience))

    @overload
    def cast_many(
        self, rows: Iterable[JSON], target: type[T], instructions: str | None = None, **options: Unpack[SubmitOptions]
    ) -> AsyncIterator[CastResult[T]]: ...
    @overload
    def cast_many(
        self,
        rows: Iterable[JSON],
        target: str | Mapping[str, JSON],
        instructions: str | None = None,
        **options: Unpack[SubmitOptions],
    ) -> AsyncIterator[CastResult[JSON]]: ...
    def cast_many(
        self, rows: Iterable[JSON], target: Any, instructions: str | None = None, **options: Unpack[SubmitOptions]
    ) -> AsyncIterator[CastResult[Any]]:
        refuse_unknown("cast_many", options, ("instructions", *SubmitOptions.__annotations__))
        return self._cast_many(iter(rows), exchanges.Casting(target, instructions), options)

    async def _cast_many(
        self, rows: Iterator[JSON], casting: exchanges.Casting, options: SubmitOptions
    ) -> AsyncIterator[CastResult[Any]]:
        batches = deque[UUID]()
        while True:
            while len(batches) < _BATCHES and (some := list(islice(rows, _ROWS))):
                batches.append((await self._perform(casting.submit_many(some, options, self._patience))).id)
            if not batches:
                return
            for result in await self._perform(casting.results(batches.popleft(), self._patience)):
                yield result

    async def get(self, run_id: UUID | str) -> Run:
        return await self._perform(exchanges.get(run_id, self._patience))

    async def result(self, run_id: UUID | str) -> JSON:
        return await self._perform(exchanges.result(run_id, self._patience))

    async def wait(self, run_id: UUID | str, **waiting: Unpack[Waiting]) -> Run:
        return await self._perform(exchanges.wait(run_id, waiting, self._patience))

    def stream(self, run_id: UUID | str, *, logs: bool = False) -> AsyncIterator[Event]:
        return self._stream(Following("runs", run_id, logs=logs))

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

    async def why(self, run_id: UUID | str) -> Why:
        return await self._perform(exchanges.why(run_id, self._patience))

    async def logs(self, run_id: UUID | str) -> Sequence[LogLine]:
        return await self._perform(exchanges.logs(run_id, self._patience))

    async def follow_logs(self, run_id: UUID | str) -> AsyncIterator[LogLine]:
        async for event in self.stream(run_id, logs=True):
            if event.name == "log":
                yield LogLine.model_validate(event.data, extra="ignore")

    async def retry_many(self, *, key: str | None = None, **chosen: Unpack[exchanges.Chosen]) -> Operation:
        return await self._perform(exchanges.many("retry", chosen, key, self._patience))

    async def cancel_many(self, *, key: str | None = None, **chosen: Unpack[exchanges.Chosen]) -> Operation:
        return await self._perform(exchanges.many("cancel", chosen, key, self._patience))

    async def count_to_retry(self, **chosen: Unpack[exchanges.Chosen]) -> Matched:
        return await self._perform(exchanges.count_many("retry", chosen, self._patience))

    async def count_to_cancel(self, **chosen: Unpack[exchanges.Chosen]) -> Matched:
        return await self._perform(exchanges.count_many("cancel", chosen, self._patience))

    async def operation(self, operation_id: UUID | str) -> Operation:
        return await self._perform(exchanges.operation("GET", operation_id, "", self._patience))

    async def stop_operation(self, operation_id: UUID | str) -> Operation:
        return await self._perform(exchanges.operation("POST", operation_id, "/cancel", self._patience))

    async def retry_batch(self, batch_id: UUID | str, *, key: str | None = None) -> Operation:
        return await self._perform(exchanges.retry_batch(batch_id, key, self._patience))

    async def input(self, run_id: UUID | str) -> JSON:
        return await self._perform(exchanges.kept_input(run_id, self._patience))

    async def attempts(self, run_id: UUID | str) -> Attempts:
        return await self._perform(exchanges.attempts(run_id, self._patience))

    async def retry(
        self, run_id: UUID | str, *, key: str | None = None, **changes: Unpack[exchanges.RetryChanges]
    ) -> Run:
        return await self._perform(exchanges.retry(run_id, changes, key, self._patience))

    async def cancel(self, run_id: UUID | str) -> Run:
        return await self._perform(exchanges.cancel(run_id, self._patience))

    async def task(self, name: str) -> TaskType:
        return await self._perform(exchanges.task(name, self._patience))

    async def tasks(self) -> Sequence[TaskType]:
        return await self._perform(exchanges.tasks(self._patience))

    async def batch(self, batch_id: UUID | str) -> Batch:
        return await self._perform(exchanges.batch("GET", batch_id, "", self._patience))

    async def submit_lines(
        self,
        lines: bytes,
        *,
        task: str | None = None,
        owner: str | None = None,
        on_error: Literal["reject", "skip"] = "reject",
        key: str | None = None,
    ) -> Batch:
        params = {"task": task, "owner": owner, "on_error": on_error}
        return await self._perform(exchanges.submit_lines(lines, params, key, self._patience))

    async def batch_errors(self, batch_id: UUID | str) -> Sequence[JSON]:
        return await self._perform(exchanges.batch_errors(batch_id, self._patience))

    async def batch_results(self, batch_id: UUID | str) -> Sequence[BatchResult]:
        return await self._perform(exchanges.batch_results(batch_id, self._patience))

    async def cancel_batch(self, batch_id: UUID | str) -> Batch:
        return await self._perform(exchanges.batch("POST", batch_id, "/cancel", self._patience))

    async def lanes(self) -> Sequence[Lane]:
        return await self._perform(exchanges.lanes(self._patience))

    async def lane(self, name: str) -> Lane:
        return await self._perform(exchanges.lane("GET", name, None, self._patience))

    async def limit_lane(self, name: str, limits: Limits) -> Lane:
        return await self._perform(exchanges.lane("PUT", name, limits, self._patience))

    async def lift_lane(self, name: str) -> None:
        await self._perform(exchanges.lift_lane(name, self._patience))

    async def pauses(self) -> Sequence[Pause]:
        return await self._perform(exchanges.pauses(self._patience))

    async def pause(self, kind: PauseKind | str, name: str, **options: Unpack[exchanges.PauseOptions]) -> Pause:
        return await self._perform(exchanges.pause(kind, name, options, self._patience))

    async def resume(self, kind: PauseKind | str, name: str) -> None:
        await self._perform(exchanges.resume(kind, name, self._patience))

    async def counts(self, within: Within | str = Within.HOUR) -> Counts:
        return await self._perform(exchanges.counts(within, self._patience))

    async def pools(self) -> Sequence[Pool]:
        """The pools, with what waits in them and who works on it."""
        return await self._perform(exchanges.pools(self._patience))

    async def workers(self) -> Sequence[Worker]:
        """The workers, the newest first; those that are silent are listed until they are removed."""
        return await self._perform(exchanges.workers(self._patience))

    async def drain(self, worker_id: UUID | str) -> None:
        await self._perform(exchanges.drain(worker_id, self._patience))

    def list(self, *, limit: int | None = None, **filters: Unpack[Filters]) -> AsyncIterator[Run]:
        return self._pages(exchanges.first_page(filters, limit))

    async def page(self, *, limit: int = 50, cursor: UUID | str | None = None, **filters: Unpack[Filters]) -> RunPage:
        """One page of `list`; `next_cursor` leads to the next one."""
        return await self._perform(exchanges.run_page(filters, limit, cursor, self._patience))

    async def _pages(self, ask: exchanges.PageRequest | None) -> AsyncIterator[Run]:
        while ask:
            runs, ask = await self._perform(exchanges.page(ask, self._patience))
            for run in runs:
                yield run

    async def _perform(self, flow: Flow[T]) -> T:
        got = None
        try:
            while True:
                step = flow.send(got)
                if isinstance(step, Ask):
                    try:
                        got = await self._http.request(**to_httpx(step))
                    except httpx.TransportError as error:
                        got = error
                else:
                    got = await asyncio.sleep(step)
        except StopIteration as end:
            return end.value


def authorization(key: str | None) -> dict[str, str]:
    """The `headers` that show this key to the service; none without a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}
