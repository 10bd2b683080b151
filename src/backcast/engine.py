"""Runs one attempt of a run on Prefect's own task engine. Decides how a Prefect `Task` becomes a task type, and what
the end of an attempt means to us; knows nothing of queues, leases or workers.

The facts of Prefect 3.8.8 that this rests on are held by tests/integration/test_engine_contract.py.
"""

import asyncio
import contextlib
import contextvars
import copy
import hashlib
import importlib
import inspect
import json
import time
import typing
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self
from uuid import UUID

from prefect import Task
from prefect.cache_policies import NO_CACHE, CachePolicy, RunId
from prefect.client.schemas.objects import State
from prefect.context import AsyncClientContext, SyncClientContext
from prefect.filesystems import WritableFileSystem
from prefect.results import ResultRecord  # pyright: ignore[reportPrivateImportUsage]
from prefect.serializers import Serializer
from prefect.states import Cancelled, Pending
from prefect.task_engine import AsyncTaskRunEngine, SyncTaskRunEngine, TaskRunTimeoutError
from prefect.utilities.callables import parameter_schema
from pydantic import PrivateAttr, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from backcast.errors import ConfigurationError, FatalError, RunError, RunTimeout, UsageError
from backcast.models import JSON, Attempt, Failed, Problem, Retry, Succeeded, TaskType
from backcast.store import Store

_DETAIL = 2000
"""Characters of an exception's message that are kept."""


def to_json(value: Any) -> bytes:
    """The plain JSON of a task's return value: models, dataclasses, dates and the like by pydantic's rules.

    Raises:
        FatalError: `unserialisable_result`; the sentence names the type or value.
    """
    try:
        text = json.dumps(to_jsonable_python(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        return text.encode()
    except (PydanticSerializationError, ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        raise FatalError(
            f"The task returned a {type(value).__name__} that can't be written as JSON ({error}): return plain values,"
            " pydantic models or dataclasses.",
            code="unserialisable_result",
        ) from None


class PlainJSON(Serializer):
    """Prefect's cache records as plain JSON. The stock serializer imports classes that are named in the text."""

    type: Literal["plainjson"] = "plainjson"  # pyright: ignore[reportIncompatibleVariableOverride]  # Prefect's own way

    def dumps(self, obj: Any) -> bytes:
        return to_json(obj)

    def loads(self, blob: bytes) -> Any:
        return json.loads(blob)


class CacheStorage(WritableFileSystem):
    """Our store as Prefect sees it, for the records of cache policies. Usable from any thread: calls go to our loop."""

    _block_type_slug = "backcast-cache"
    _store: Store = PrivateAttr()
    _loop: asyncio.AbstractEventLoop = PrivateAttr()

    @classmethod
    def over(cls, store: Store, loop: asyncio.AbstractEventLoop) -> Self:
        storage = cls()
        storage._store, storage._loop = store, loop
        return storage

    async def read_path(self, path: str) -> bytes:
        return await self._there(self._store.get(self._key(path)))

    async def write_path(self, path: str, content: bytes) -> None:
        await self._there(self._store.put(self._key(path), content))

    def _resolve_path(self, path: str) -> str:
        return path

    def _key(self, path: str) -> str:
        return f"cache/{hashlib.sha256(path.encode()).hexdigest()}"  # a user's cache key may be any text

    async def _there(self, work: typing.Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


def discover(modules: Iterable[str]) -> dict[str, "Task[..., Any]"]:
    """The tasks of these modules by their names, which is what routes runs: files may move and lines change.

    Raises:
        ConfigurationError: a module can't be imported, or two tasks have the same name.
    """
    found: dict[str, Task[..., Any]] = {}
    for module in modules:
        try:
            members = vars(importlib.import_module(module))
        except Exception as error:
            raise ConfigurationError(
                f"BACKCAST_TASKS names {module}, which can't be imported ({type(error).__name__}: {error}): correct the"
                " name, or put its folder on PYTHONPATH."
            ) from error
        for task in members.values():
            if not isinstance(task, Task):
                continue
            other = found.setdefault(task.name, task)
            if other is not task:
                raise ConfigurationError(f"Two tasks are named {task.name!r}: give one of them another `name=`.")
    return found


def _is_cached(policy: object) -> bool:
    """Whether a policy can hit for another run; Prefect's default one includes the run's id and never does."""
    if not isinstance(policy, CachePolicy) or policy == NO_CACHE:
        return False
    return not any(isinstance(part, RunId) for part in [policy, *getattr(policy, "policies", [])])


_PLAIN = (Any, inspect.Parameter.empty, str, int, float, bool, None, type(None), dict, list)


@dataclass(frozen=True, slots=True)
class Served:
    """A task that this process serves: what callers see, and what the engine runs."""

    type: TaskType
    task: "Task[..., Any]"
    parameters: Mapping[str, TypeAdapter[Any]]
    """How parameters with types beyond plain JSON (dates, models) are made from JSON."""

    def bind(self, given: dict[str, JSON]) -> dict[str, Any]:
        """Raises `UsageError` with the parameter's name."""
        bound = dict(given)
        for name, adapter in self.parameters.items():
            if name in bound:
                try:
                    bound[name] = adapter.validate_python(bound[name])
                except ValidationError as error:
                    first = error.errors(include_url=False)[0]
                    where = "/".join(str(part) for part in (name, *first["loc"]))
                    raise UsageError(f"{where}: {first['msg']}", code="invalid_input") from None
        missing = [name for name in self.type.input_schema.get("required", []) if name not in bound]
        unknown = [name for name in bound if name not in self.type.input_schema.get("properties", {})]
        if missing or unknown:
            raise UsageError(f"Missing parameters: {missing}; unknown: {unknown}.", code="invalid_input")
        return bound


def serve(task: "Task[..., Any]", *, pool: str, max_attempts: int, storage: WritableFileSystem) -> Served:
    """How this task is offered and run. The user's object stays as it is; the engine gets a copy that carries storage
    (or each run would ask the server for it), no tags (each costs a call and fails without the server) and, unless a
    cache policy asks for it, no persistence: we write results ourselves."""
    hints: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # annotations may name what exists for type checkers only
        hints = typing.get_type_hints(task.fn, include_extras=True)
    schema = parameter_schema(task.fn).model_dump_for_openapi()
    for prop in schema["properties"].values():
        prop.pop("position", None)
    schema.setdefault("additionalProperties", False)
    if not schema.get("definitions"):
        schema.pop("definitions", None)
    output: dict[str, JSON] = {}
    if "return" in hints:
        with contextlib.suppress(Exception):  # a return type that pydantic can't describe is no error
            output = TypeAdapter(hints["return"]).json_schema(mode="serialization")
    adapters: dict[str, TypeAdapter[Any]] = {}
    for name in schema["properties"]:
        if hints.get(name, Any) not in _PLAIN:
            adapters[name] = TypeAdapter(hints[name])
    cached = _is_cached(task.cache_policy)
    ours = copy.copy(task)
    ours.tags = set()
    ours.cache_policy = task.cache_policy if cached else NO_CACHE
    ours.persist_result = cached
    ours.result_storage = storage
    ours.result_serializer = PlainJSON()
    ours.result_storage_key = None  # a key of the user's would silently disable the cache
    return Served(
        type=TaskType(
            name=task.name,
            pool=pool,
            version=task.version or "",
            description=inspect.cleandoc(task.description or ""),
            input_schema=schema,
            output_schema=output,
            retries=task.retries or 0,
            timeout=timedelta(seconds=task.timeout_seconds) if task.timeout_seconds else None,
            max_attempts=max_attempts,
        ),
        task=ours,
        parameters=adapters,
    )


@dataclass
class _Observed:
    """What we add to Prefect's engines: the cause of a failure, our rule for retries, no log line for each run."""

    cause: Exception | None = field(default=None, kw_only=True)
    body: bytes = field(default=b"", kw_only=True)
    """The value as JSON, made before Prefect is told that the run is completed."""

    @property
    def parked(self) -> bool:
        """The attempt is over and another one is due later; waiting for it must not hold the slot."""
        state = typing.cast("Any", self).state
        return state.name == "AwaitingRetry" or (state.name == "Retrying" and _retry_after(self.cause) is not None)

    def keep(self, value: Any) -> None:
        if not isinstance(value, State):  # a task may return a failed state; Prefect decides what it means
            self.body = to_json(value.result if isinstance(value, ResultRecord) else value)

    def log_finished_message(self) -> None:
        """The state says it; a log record for each run would cost more than the run."""


@dataclass
class _AsyncEngine(_Observed, AsyncTaskRunEngine[Any, Any]):
    async def begin_run(self) -> None:
        assert self.task_run is not None
        self.task_run.run_count = self.retries  # Prefect shows all attempts as one run
        await super().begin_run()

    async def can_retry(self, exc_or_state: Any) -> bool:
        return _may_retry(exc_or_state) and await super().can_retry(exc_or_state)

    async def set_state(self, state: Any, force: bool = False) -> Any:
        state.message = state.message and _clean(state.message)  # or Prefect's event can't be written, and is lost
        return await super().set_state(state, force=force)

    async def handle_success(self, result: Any, transaction: Any) -> Any:
        self.keep(result)
        return await super().handle_success(result, transaction)

    async def handle_exception(self, exc: Exception) -> None:
        self.cause = exc
        await super().handle_exception(exc)

    async def handle_timeout(self, exc: TimeoutError) -> None:
        self.cause = exc
        await super().handle_timeout(exc)

    async def handle_crash(self, exc: BaseException) -> None:
        match exc.args[:1]:  # see `models.Reason`
            case ("cancelled",):
                await self.set_state(Cancelled(message="Cancelled by request."), force=True)
            case ("handed back",):
                message = "Its worker stopped before it had finished; another one runs it."
                await self.set_state(Pending(name="HandedBack", message=message), force=True)
            case ("lost",):
                pass  # another worker has the run and speaks for it
            case _:
                await super().handle_crash(exc)

    async def drive(self, run_id: UUID) -> None:
        async with self.start(task_run_id=run_id):
            while self.is_running():
                async with self.asset_context(), self.run_context(), self.transaction_context() as transaction:
                    await self.call_task_fn(transaction)
                if self.parked:
                    break


@dataclass
class _SyncEngine(_Observed, SyncTaskRunEngine[Any, Any]):
    def begin_run(self) -> None:
        assert self.task_run is not None
        self.task_run.run_count = self.retries
        super().begin_run()

    def can_retry(self, exc_or_state: Any) -> bool:
        return _may_retry(exc_or_state) and super().can_retry(exc_or_state)

    def set_state(self, state: Any, force: bool = False) -> Any:
        state.message = state.message and _clean(state.message)
        return super().set_state(state, force=force)

    def handle_success(self, result: Any, transaction: Any) -> Any:
        self.keep(result)
        return super().handle_success(result, transaction)

    def handle_exception(self, exc: Exception) -> None:
        self.cause = exc
        super().handle_exception(exc)

    def handle_timeout(self, exc: TimeoutError) -> None:
        self.cause = exc
        super().handle_timeout(exc)

    def drive(self, run_id: UUID) -> None:
        with self.start(task_run_id=run_id):
            while self.is_running():
                with self.asset_context(), self.run_context(), self.transaction_context() as transaction:
                    self.call_task_fn(transaction)
                if self.parked:
                    break


def _may_retry(cause: object) -> bool:
    return not isinstance(cause, RunError) or cause.retryable


def _retry_after(cause: object) -> float | None:
    after = cause.retry_after if isinstance(cause, RunError) else None
    return None if after is None else after.total_seconds()


def _problem(cause: Exception | None, message: str | None) -> Problem:
    if isinstance(cause, TaskRunTimeoutError):
        return Problem(code=RunTimeout.code, title=RunTimeout.title, detail=message or str(cause))
    if isinstance(cause, RunError):
        return Problem(code=cause.code, title=cause.title, detail=_clean(cause.detail)[:_DETAIL])
    detail = message or "" if cause is None else f"{type(cause).__name__}: {cause}"
    return Problem(code=RunError.code, title=RunError.title, detail=_clean(detail)[:_DETAIL])


def _clean(text: str) -> str:
    """What can't be UTF-8 (lone surrogates) or text in PostgreSQL (NUL) is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")


class Engine:
    """The tasks of this process and the means to run them. Enter it once, for the life of the worker: one client
    context for all runs is what keeps HTTP calls off the hot path."""

    def __init__(
        self, tasks: Mapping[str, "Task[..., Any]"], *, pool: str, max_attempts: int, store: Store, threads: int
    ):
        storage = CacheStorage.over(store, asyncio.get_running_loop())
        self.served = {
            name: serve(task, pool=pool, max_attempts=max_attempts, storage=storage)
            for name, task in tasks.items()
            if not task.isgenerator  # a stream of values has no place to go yet
        }
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="task")
        self._contexts = contextlib.AsyncExitStack()

    @property
    def types(self) -> list[TaskType]:
        return [served.type for served in self.served.values()]

    async def __aenter__(self) -> Self:
        await self._contexts.enter_async_context(AsyncClientContext.get_or_create())
        self._contexts.enter_context(SyncClientContext.get_or_create())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._contexts.aclose()

    async def execute(self, name: str, run_id: UUID, given: dict[str, JSON], *, retries: int) -> Attempt:
        """Make one attempt; `retries` is how many were made before. Raises nothing but `CancelledError`."""
        served = self.served[name]
        try:
            parameters = served.bind(given)
            if served.task.isasync:
                engine = _AsyncEngine(task=served.task, parameters=parameters, retries=retries)
                await engine.drive(run_id)
            else:
                engine = _SyncEngine(task=served.task, parameters=parameters, retries=retries)
                # The copied context carries the client of this worker into the thread.
                work: Callable[[], None] = lambda: engine.drive(run_id)  # noqa: E731
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._threads, contextvars.copy_context().run, work)
            state = engine.state
            if engine.parked:
                at = state.state_details.scheduled_time
                backoff = at.timestamp() - time.time() if at else 0.0
                delay = max(backoff, _retry_after(engine.cause) or 0.0, 0.0)
                return Retry(_problem(engine.cause, state.message), delay, engine.retries)
            if not state.is_completed():
                return Failed(_problem(engine.cause, state.message))
            return Succeeded(engine.body)
        except Exception as error:  # noqa: BLE001  # whatever a task or the engine raises becomes the run's problem
            return Failed(_problem(error, None))
