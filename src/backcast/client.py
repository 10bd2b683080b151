"""A typed client of the HTTP interface, synchronous and asynchronous.

Decides what is sent, what an answer means and when to ask again. Each exchange is written once, as a generator that
yields requests (or seconds to pause) and is sent the answers; the two classes only perform them. Every request may be
sent twice without harm, submissions by their Idempotency-Key, so an outage is waited out for `patience` seconds.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Self, TypeAlias, TypedDict, TypeVar, Unpack, overload
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from backcast.errors import (
    BackcastError,
    ClientError,
    ConfigurationError,
    FieldError,
    InvalidInput,
    RunError,
    TooManyWaiting,
    Unavailable,
)
from backcast.models import JSON, Batch, Lane, Limits, Run, State, Submission, TaskType

DEFAULT_URL = "http://127.0.0.1:8000"
CAST = "create_structured_output"

_HOLD = 20.0  # seconds the service may hold a poll: under the idle timeout of every common proxy (30 s and more)
_WATCHED_HOLD = 2.0  # when someone looks on: an answer comes at the end only, and "queued" should not look stuck
_OUTAGE = 120.0  # seconds of silence that a wait survives once it has had an answer: longer than a restart or failover
_PAGE = 100

T = TypeVar("T")
Noun = TypeVar("Noun", bound=BaseModel)
Progress: TypeAlias = Callable[[Run], object]
"""Called with the run after every look at it."""


class Waiting(TypedDict, total=False):
    """How to wait: `timeout` in seconds (none: for ever), and who is told of every look."""

    timeout: float | None
    progress: Progress | None


class Filters(TypedDict, total=False):
    state: State | None
    task: str | None
    owner: str | None
    batch: UUID | str | None


class Options(TypedDict, total=False):
    """The fields of a `Submission` beside its input."""

    owner: str
    priority: int
    run_at: datetime | None
    deadline: datetime | None
    lane: str | None
    metadata: dict[str, str]


class _Ask(NamedTuple):
    method: str
    url: str
    params: Mapping[str, str] = {}
    content: bytes | None = None
    headers: Mapping[str, str] = {}
    timeout: float = 10.0


class _RunPage(BaseModel):
    items: list[Run]
    next_cursor: str | None = None


class _TaskTypes(BaseModel):
    items: list[TaskType]


class _Lanes(BaseModel):
    items: list[Lane]


class _Page(NamedTuple):
    params: Mapping[str, str]
    left: int | None
    """Runs still wanted; None is all of them."""


Flow: TypeAlias = Generator[_Ask | float, httpx.Response | httpx.TransportError | None, T]


class WaitTimeout(BackcastError, TimeoutError):
    """The run was still going when the caller's `timeout` had passed. Nothing happened to the run."""

    code = "wait_timeout"
    title = "The run has not ended in time"


class Client:
    """The service at `url`. `headers` go with every request; `patience` is in seconds."""

    def __init__(
        self, url: str = DEFAULT_URL, *, headers: Mapping[str, str] | None = None, patience: float = 10.0
    ) -> None:
        self._patience = patience
        self._http = httpx.Client(**_connection(url, headers))

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
        **options: Unpack[Options],
    ) -> Run:
        """Queue a run of `task`. A mapping is the task's input; `options` set the other fields of the submission.

        `key` is the Idempotency-Key; one is made up when none is given.
        """
        return self._perform(_submit(task, submission, options, key, self._patience))

    def submit_many(
        self,
        task: str,
        submissions: Iterable[Submission | Mapping[str, JSON]],
        *,
        key: str | None = None,
        **options: Unpack[Options],
    ) -> Batch:
        """Queue a run of `task` for each of them, all or none, with one request; `options` hold for every one."""
        return self._perform(_submit_many(task, submissions, options, key, self._patience))

    @overload
    def cast(self, data: JSON, target: type[T], instructions: str | None = None, **waiting: Unpack[Waiting]) -> T: ...
    @overload
    def cast(
        self, data: JSON, target: str | Mapping[str, JSON], instructions: str | None = None, **waiting: Unpack[Waiting]
    ) -> JSON: ...
    def cast(self, data: JSON, target: Any, instructions: str | None = None, **waiting: Unpack[Waiting]) -> Any:
        """Turn `data` into `target`: a name (`"list[str]"`), a JSON Schema, or a Python type, whose value is returned.

        Raises:
            RunError: the run failed, expired or was cancelled; `code` says why.
            WaitTimeout: it takes longer than `timeout` seconds.
            pydantic.ValidationError: the Python type has a validator of its own that refuses the result.
        """
        return self._perform(_cast(data, target, instructions, waiting, self._patience))

    def get(self, run_id: UUID | str) -> Run:
        return self._perform(_get(run_id, self._patience))

    def result(self, run_id: UUID | str) -> JSON:
        """The run's result.

        Raises:
            NotFinished, NoResult, ResultGone: there is none yet, there will be none, there was one.
        """
        return self._perform(_result(run_id, self._patience))

    def wait(self, run_id: UUID | str, **waiting: Unpack[Waiting]) -> Run:
        """The run once it has ended, however it ended; `raise_for_state` turns a bad end into an error.

        Raises:
            WaitTimeout: it takes longer than `timeout` seconds.
        """
        return self._perform(_wait(run_id, waiting, self._patience))

    def cancel(self, run_id: UUID | str) -> Run:
        return self._perform(_cancel(run_id, self._patience))

    def task(self, name: str) -> TaskType:
        return self._perform(_task(name, self._patience))

    def tasks(self) -> Sequence[TaskType]:
        return self._perform(_tasks(self._patience))

    def batch(self, batch_id: UUID | str) -> Batch:
        """A batch, with its runs counted by state; `list(batch=…)` has the runs."""
        return self._perform(_batch("GET", batch_id, "", self._patience))

    def cancel_batch(self, batch_id: UUID | str) -> Batch:
        """Cancel every run of the batch that has not ended."""
        return self._perform(_batch("POST", batch_id, "/cancel", self._patience))

    def lanes(self) -> Sequence[Lane]:
        """The lanes that have limits."""
        return self._perform(_lanes(self._patience))

    def lane(self, name: str) -> Lane:
        return self._perform(_lane("GET", name, None, self._patience))

    def limit_lane(self, name: str, limits: Limits) -> Lane:
        """Replace the limits of a lane."""
        return self._perform(_lane("PUT", name, limits, self._patience))

    def lift_lane(self, name: str) -> None:
        """Take the limits of a lane away; its runs that wait for it go on."""
        self._perform(_lift_lane(name, self._patience))

    def list(self, *, limit: int | None = None, **filters: Unpack[Filters]) -> Iterator[Run]:
        """Runs, newest first; pages are fetched as they are read."""
        ask = _first_page(filters, limit)
        while ask:
            runs, ask = self._perform(_page(ask, self._patience))
            yield from runs

    def _perform(self, flow: Flow[T]) -> T:
        got = None
        try:
            while True:
                step = flow.send(got)
                if isinstance(step, _Ask):
                    try:
                        got = self._http.request(**_to_httpx(step))
                    except httpx.TransportError as error:
                        got = error
                else:
                    got = time.sleep(step)
        except StopIteration as end:
            return end.value


class AsyncClient:
    """`Client` for asyncio; the methods are the same."""

    def __init__(
        self, url: str = DEFAULT_URL, *, headers: Mapping[str, str] | None = None, patience: float = 10.0
    ) -> None:
        self._patience = patience
        self._http = httpx.AsyncClient(**_connection(url, headers))

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
        **options: Unpack[Options],
    ) -> Run:
        return await self._perform(_submit(task, submission, options, key, self._patience))

    async def submit_many(
        self,
        task: str,
        submissions: Iterable[Submission | Mapping[str, JSON]],
        *,
        key: str | None = None,
        **options: Unpack[Options],
    ) -> Batch:
        return await self._perform(_submit_many(task, submissions, options, key, self._patience))

    @overload
    async def cast(
        self, data: JSON, target: type[T], instructions: str | None = None, **waiting: Unpack[Waiting]
    ) -> T: ...
    @overload
    async def cast(
        self, data: JSON, target: str | Mapping[str, JSON], instructions: str | None = None, **waiting: Unpack[Waiting]
    ) -> JSON: ...
    async def cast(self, data: JSON, target: Any, instructions: str | None = None, **waiting: Unpack[Waiting]) -> Any:
        return await self._perform(_cast(data, target, instructions, waiting, self._patience))

    async def get(self, run_id: UUID | str) -> Run:
        return await self._perform(_get(run_id, self._patience))

    async def result(self, run_id: UUID | str) -> JSON:
        return await self._perform(_result(run_id, self._patience))

    async def wait(self, run_id: UUID | str, **waiting: Unpack[Waiting]) -> Run:
        return await self._perform(_wait(run_id, waiting, self._patience))

    async def cancel(self, run_id: UUID | str) -> Run:
        return await self._perform(_cancel(run_id, self._patience))

    async def task(self, name: str) -> TaskType:
        return await self._perform(_task(name, self._patience))

    async def tasks(self) -> Sequence[TaskType]:
        return await self._perform(_tasks(self._patience))

    async def batch(self, batch_id: UUID | str) -> Batch:
        return await self._perform(_batch("GET", batch_id, "", self._patience))

    async def cancel_batch(self, batch_id: UUID | str) -> Batch:
        return await self._perform(_batch("POST", batch_id, "/cancel", self._patience))

    async def lanes(self) -> Sequence[Lane]:
        return await self._perform(_lanes(self._patience))

    async def lane(self, name: str) -> Lane:
        return await self._perform(_lane("GET", name, None, self._patience))

    async def limit_lane(self, name: str, limits: Limits) -> Lane:
        return await self._perform(_lane("PUT", name, limits, self._patience))

    async def lift_lane(self, name: str) -> None:
        await self._perform(_lift_lane(name, self._patience))

    async def list(self, *, limit: int | None = None, **filters: Unpack[Filters]) -> AsyncIterator[Run]:
        ask = _first_page(filters, limit)
        while ask:
            runs, ask = await self._perform(_page(ask, self._patience))
            for run in runs:
                yield run

    async def _perform(self, flow: Flow[T]) -> T:
        got = None
        try:
            while True:
                step = flow.send(got)
                if isinstance(step, _Ask):
                    try:
                        got = await self._http.request(**_to_httpx(step))
                    except httpx.TransportError as error:
                        got = error
                else:
                    got = await asyncio.sleep(step)
        except StopIteration as end:
            return end.value


def authorization(key: str | None) -> dict[str, str]:
    """The `headers` that show this key to the service; none without a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def raise_for_state(run: Run) -> None:
    """Raise a RunError, with the run's own code, when `run` has ended without a result."""
    match run.state:
        case State.QUEUED | State.RUNNING | State.COMPLETED:
            return
        case State.FAILED:
            ending = "failed"
        case State.CANCELLED:
            ending = "was cancelled"
        case State.EXPIRED:
            ending = "expired before a worker could take it"
    if run.error is None:
        raise RunError(f"Run {run.id} {ending}.", code=run.state.value)
    raise RunError(f"Run {run.id} {ending}: {run.error.detail}", code=run.error.code)


# The exchanges


def _submit(
    task: str, submission: Submission | Mapping[str, JSON], options: Options, key: str | None, patience: float
) -> Flow[Run]:
    ask = _Ask("POST", f"/v1/tasks/{quote(task, safe='')}/runs", {}, _body(submission, options), _headers(key))
    return _read(Run, (yield from _answer(ask, patience)))


def _submit_many(
    task: str,
    submissions: Iterable[Submission | Mapping[str, JSON]],
    options: Options,
    key: str | None,
    patience: float,
) -> Flow[Batch]:
    body = b"".join(_body(submission, options) + b"\n" for submission in submissions)
    headers = _headers(key) | {"Content-Type": "application/jsonl"}
    ask = _Ask("POST", "/v1/batches", {"task": task}, body, headers, timeout=60.0)
    return _read(Batch, (yield from _answer(ask, patience)))


def _batch(method: str, batch_id: UUID | str, verb: str, patience: float) -> Flow[Batch]:
    ask = _Ask(method, f"/v1/batches/{quote(str(batch_id), safe='')}{verb}", timeout=60.0)
    return _read(Batch, (yield from _answer(ask, patience)))


def _lanes(patience: float) -> Flow[Sequence[Lane]]:
    return _read(_Lanes, (yield from _answer(_Ask("GET", "/v1/lanes"), patience))).items


def _lane(method: str, name: str, limits: Limits | None, patience: float) -> Flow[Lane]:
    body = None if limits is None else limits.model_dump_json(include=set(Limits.model_fields)).encode()
    headers = {} if body is None else {"Content-Type": "application/json"}
    return _read(Lane, (yield from _answer(_Ask(method, _lane_path(name), {}, body, headers), patience)))


def _lift_lane(name: str, patience: float) -> Flow[None]:
    yield from _answer(_Ask("DELETE", _lane_path(name)), patience)


def _cast(data: JSON, target: Any, instructions: str | None, waiting: Waiting, patience: float) -> Flow[Any]:
    is_wire = isinstance(target, str | Mapping)
    python_type = None if is_wire else TypeAdapter[Any](target)
    wanted = {"data": data, "target": target if python_type is None else python_type.json_schema()}
    if instructions is not None:
        wanted["instructions"] = instructions
    run = yield from _submit(CAST, wanted, {}, None, patience)
    if progress := waiting.get("progress"):
        progress(run)
    run = yield from _wait(run.id, waiting, patience)
    raise_for_state(run)
    value = yield from _result(run.id, patience)
    return value if python_type is None else python_type.validate_json(json.dumps(value))


def _wait(run_id: UUID | str, waiting: Waiting, patience: float) -> Flow[Run]:
    timeout, progress = waiting.get("timeout"), waiting.get("progress")
    end = math.inf if timeout is None else time.monotonic() + timeout
    hold = _WATCHED_HOLD if progress else _HOLD
    while True:
        asked = time.monotonic()
        left = max(0.0, end - asked)
        seconds = int(min(hold, left))
        headers = {"Prefer": f"wait={seconds}"} if seconds else {}
        ask = _Ask("GET", _run_path(run_id), headers=headers, timeout=seconds + min(10.0, max(1.0, left)))
        run = _read(Run, (yield from _answer(ask, min(patience, left))))
        patience = _OUTAGE
        if progress:
            progress(run)
        if run.state.is_final:
            return run
        now = time.monotonic()
        if now >= end:
            raise WaitTimeout(f"Run {run_id} is still {run.state} after {timeout:g} s; it goes on.")
        yield min(max(0.0, asked + 0.25 - now), end - now)  # four looks per second where polls are not held


def _get(run_id: UUID | str, patience: float) -> Flow[Run]:
    return _read(Run, (yield from _answer(_Ask("GET", _run_path(run_id)), patience)))


def _result(run_id: UUID | str, patience: float) -> Flow[JSON]:
    return _json((yield from _answer(_Ask("GET", _run_path(run_id) + "/result"), patience)))


def _cancel(run_id: UUID | str, patience: float) -> Flow[Run]:
    return _read(Run, (yield from _answer(_Ask("POST", _run_path(run_id) + "/cancel"), patience)))


def _task(name: str, patience: float) -> Flow[TaskType]:
    return _read(TaskType, (yield from _answer(_Ask("GET", f"/v1/tasks/{quote(name, safe='')}"), patience)))


def _tasks(patience: float) -> Flow[Sequence[TaskType]]:
    return _read(_TaskTypes, (yield from _answer(_Ask("GET", "/v1/tasks"), patience))).items


def _first_page(filters: Filters, limit: int | None) -> _Page | None:
    return _next_page({name: str(value) for name, value in filters.items() if value is not None}, limit)


def _next_page(params: Mapping[str, str], left: int | None) -> _Page | None:
    if left is not None and left <= 0:
        return None
    return _Page({**params, "limit": str(_PAGE if left is None else min(left, _PAGE))}, left)


def _page(page: _Page, patience: float) -> Flow[tuple[Sequence[Run], _Page | None]]:
    got = _read(_RunPage, (yield from _answer(_Ask("GET", "/v1/runs", page.params), patience)))
    if got.next_cursor is None:
        return got.items, None
    left = None if page.left is None else page.left - len(got.items)
    return got.items, _next_page({**page.params, "cursor": got.next_cursor}, left)


def _answer(ask: _Ask, patience: float) -> Flow[httpx.Response]:
    """Ask until there is an answer, or nothing but "come back later" for `patience` seconds."""
    give_up = time.monotonic() + patience
    pause = 0.1
    while True:
        got = yield ask
        assert got is not None  # only pauses are answered with nothing
        if isinstance(got, httpx.Response):
            if got.is_success:
                return got
            trouble, retry_after = _refusal(got), got.headers.get("Retry-After", "")
            if got.status_code not in (429, 502, 503, 504):
                raise trouble
        else:
            trouble, retry_after = _silence(got), ""
        seconds = max(pause, float(retry_after) if retry_after.isdecimal() else 0.0)
        seconds *= random.uniform(1.0, 1.5)  # noqa: S311  # so that clients do not all come back together
        if time.monotonic() + seconds > give_up:
            raise trouble
        yield seconds
        pause = min(pause * 2, 5.0)


# What is sent


def _connection(url: str, headers: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"{url!r} is not a URL ({error}): write it as http://host:port.") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise ConfigurationError(f"{url!r} is not the URL of a service: write it as http://host:port.")
    return {
        "base_url": address,
        "headers": headers,
        "verify": address.scheme == "https",  # reading the certificate authorities takes 40 ms
        # Never through the environment's proxy:
        "mounts": {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None},
    }


def _to_httpx(ask: _Ask) -> dict[str, Any]:
    timeout = httpx.Timeout(ask.timeout, connect=min(5.0, ask.timeout))
    return ask._asdict() | {"timeout": timeout}


def _run_path(run_id: UUID | str) -> str:
    return f"/v1/runs/{quote(str(run_id), safe='')}"


def _lane_path(name: str) -> str:
    return f"/v1/lanes/{quote(name, safe='')}"


def _headers(key: str | None) -> dict[str, str]:
    return {"Content-Type": "application/json", "Idempotency-Key": uuid4().hex if key is None else _header(key)}


def _header(key: str) -> str:
    if not key or not key.isascii() or not key.isprintable():
        raise InvalidInput("An Idempotency-Key is made of printable ASCII characters.")
    return key


def _body(submission: Submission | Mapping[str, JSON], given: Options) -> bytes:
    try:
        if not isinstance(submission, Submission):
            submission = Submission(input=dict(submission), **given)
        elif given:
            submission = Submission.model_validate({**dict(submission), **given})
        options = submission.model_dump(mode="json", exclude_defaults=True, exclude={"input"})
        # Not by pydantic, which would send NaN as null.
        return json.dumps(options | {"input": submission.input}, allow_nan=False, ensure_ascii=False).encode()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidInput(f"{'/'.join(map(str, first['loc']))}: {first['msg']}.") from None
    except (ValueError, TypeError) as error:  # NaN, a lone surrogate, an object that is no JSON value
        raise InvalidInput(f"The input is not plain JSON: {error}.") from None


# What an answer means


def _read(noun: type[Noun], answer: httpx.Response) -> Noun:
    try:
        return noun.model_validate_json(answer.content, extra="ignore")  # a newer service may say more
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise _foreign(answer, ": ".join([*map(str, first["loc"]), first["msg"]])) from None


def _json(answer: httpx.Response) -> JSON:
    try:
        return answer.json()
    except ValueError as error:
        raise _foreign(answer, str(error)) from None


def _foreign(answer: httpx.Response, why: str) -> ConfigurationError:
    return ConfigurationError(f"{answer.url} does not answer as backcast does ({why}): check the URL.")


def _silence(error: httpx.TransportError) -> Unavailable:
    url, why = error.request.url, str(error) or type(error).__name__
    return Unavailable(f"{url.scheme}://{url.netloc.decode()} can't be reached ({why}): is the service running there?")


def _kinds(root: type[BackcastError]) -> dict[str, type[BackcastError]]:
    kinds = {root.code: root}
    for kind in root.__subclasses__():
        kinds |= _kinds(kind)
    return kinds


_KINDS = _kinds(ClientError) | _kinds(Unavailable)


def _refusal(answer: httpx.Response) -> BackcastError:
    """The error of our tree that a problem document stands for; the nearest one when its code is not known here."""
    is_away = answer.status_code == 429 or answer.status_code >= 500
    try:
        problem = answer.json()
        code, title = str(problem["code"]), str(problem["title"])
        detail = str(problem.get("detail") or title)
        errors = tuple(FieldError(str(e["pointer"]), str(e["detail"])) for e in problem.get("errors") or ())
    except (ValueError, TypeError, KeyError, AttributeError):  # a proxy's page, or another service
        said = f"{answer.status_code} {answer.reason_phrase}".strip()
        return Unavailable(f"{answer.url} answered {said}.") if is_away else _foreign(answer, said)
    kind = _KINDS.get(code, Unavailable if is_away else ClientError)
    if issubclass(kind, TooManyWaiting):
        retry_after = answer.headers.get("Retry-After", "")
        error = kind(detail, retry_after=timedelta(seconds=int(retry_after) if retry_after.isdecimal() else 30))
    else:
        error = kind(detail, errors=errors) if issubclass(kind, ClientError) else kind(detail)
    vars(error).update(code=code, title=title, status=answer.status_code)
    return error
