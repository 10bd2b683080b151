"""Makes an attempt on Prefect's task engine, with its hooks, caching, logs and transactions. Decides which states are
published, and leaves out the steps that a run without a flow does not need; they are most of the engine's cost.
"""

import asyncio
import contextlib
import threading
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace
from prefect.client.schemas.objects import State
from prefect.concurrency.context import ConcurrencyContext
from prefect.context import TaskRunContext
from prefect.logging import get_logger
from prefect.logging.loggers import task_run_logger
from prefect.results import ResultRecord  # pyright: ignore[reportPrivateImportUsage]
from prefect.states import Cancelled, Pending, is_state_iterable
from prefect.task_engine import AsyncTaskRunEngine, SyncTaskRunEngine, TaskRunTimeoutError
from prefect.telemetry.run_telemetry import RunTelemetry
from prefect.transactions import AsyncTransaction, Transaction
from prefect.utilities.timeout import timeout

from backcast.executor import plain
from backcast.executor.classification import failed, may_retry, readable, retry_after
from backcast.executor.objects import CacheAway
from backcast.executor.plain import Job
from backcast.executor.threads import Overdue, is_asked
from backcast.history.events import Change
from backcast.models import AttemptResult, Retry, Succeeded
from backcast.process import tracing
from backcast.texts import storable

Publish = Callable[[Change], None]
_LOGGER = get_logger("engine")
_TELEMETRY = RunTelemetry()  # asks OpenTelemetry for a tracer, once and not for each run


@dataclass(kw_only=True)
class _Ours:
    """Our changes to Prefect's engines: the run's contexts are entered once for an attempt and are not validated;
    states go to `publish` and are not emitted; our error kinds decide about retries; the cause of a failure is kept."""

    job: Job
    publish: Publish | None
    cause: BaseException | None = None
    body: bytes = b""
    """The value as JSON, made before the completed state is published."""
    _state_lock: threading.Lock = field(default_factory=threading.Lock)
    _is_silent: bool = False

    @property
    def _engine(self) -> "SyncTaskRunEngine[Any, Any]":
        """The engine that this is mixed into, for the type checker."""
        return typing.cast("SyncTaskRunEngine[Any, Any]", self)

    @property
    def is_parked(self) -> bool:
        """The attempt is over and another one is due later; waiting for it must not hold the slot."""
        name = self._engine.state.name
        if name == "Retrying":  # at once, unless the service asks for time, or its own thread may still have the slot
            return retry_after(self.cause) is not None or self.job.keeps_slot(self.cause)
        return name == "AwaitingRetry"

    @property
    def is_done(self) -> bool:
        return self.is_parked or not self._engine.is_running()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The contexts in which a task, and the tasks that it calls, find their run."""
        engine = self._engine
        assert engine.task_run is not None
        with plain.context(self.job, engine.task_run), ConcurrencyContext(), self._span():
            if self.job.task.task_run_name:
                self.use_run_logger()
                engine._set_custom_task_run_name()  # pyright: ignore[reportPrivateUsage]
            yield

    @contextlib.contextmanager
    def _span(self) -> Iterator[None]:
        """Prefect's own span of a traced run, as its `start` would begin it."""
        engine = self._engine
        telemetry = engine._telemetry  # pyright: ignore[reportPrivateUsage]
        if telemetry is _TELEMETRY:
            yield
            return
        assert engine.task_run is not None
        if telemetry.span is None:
            telemetry.start_span(engine.task_run, typing.cast("Any", None), engine.parameters)
        assert telemetry.span is not None
        with trace.use_span(telemetry.span, record_exception=False, set_status_on_exception=False):
            yield

    def enter(self, state: "State[Any]") -> "State[Any]":
        """Enter this state now; takes the place of Prefect's `set_state`."""
        with self._state_lock:
            if not self._is_silent:
                self._enter(state)
        return state

    def silence(self, last_state: "State[Any] | None") -> None:
        """Enter `last_state`, if any; then ignore the engine's states, as its thread may have been abandoned."""
        with self._state_lock:
            if last_state is not None:
                self._enter(last_state)
            self._is_silent = True

    def _enter(self, state: "State[Any]") -> None:
        run = self._engine.task_run
        assert run is not None
        last = run.state
        state.message = state.message and storable(state.message)  # or it can't be written as JSON
        state.state_details.task_run_id = run.id
        if last is not None and last.is_running():
            run.total_run_time += state.timestamp - last.timestamp
        if state.is_running():
            run.run_count += 1
        at = typing.cast("Any", state.timestamp)
        if last is None:
            run.start_time = at
        run.end_time = at if state.is_final() else None
        run.state, run.state_id, run.state_type, run.state_name = state, state.id, state.type, state.name
        telemetry = self._engine._telemetry  # pyright: ignore[reportPrivateUsage]
        if telemetry.span is not None:
            telemetry.update_state(state)
            if state.is_completed():
                telemetry.end_span_on_success()
        if self.publish is not None:
            self.publish(self._change(state))

    def _change(self, state: "State[Any]") -> Change:
        run = self._engine.task_run
        assert run is not None
        return Change(
            run=run.id,
            task=self.job.task.name,
            label=run.name,
            type=state.type.value,
            name=state.name or "",
            message=state.message,
            at=state.timestamp,
            attempts=run.run_count,
            due=run.expected_start_time or state.timestamp,
            parameters=tuple(self.job.parameters),
            policy=self.job.template.registered.policy,
            version=self.job.task.version,
            started_at=run.start_time,
            ended_at=run.end_time,
            busy=run.total_run_time,
            scheduled_for=state.state_details.scheduled_time,
        )

    def keep(self, value: Any) -> bool:
        """Keep the function's return value. True: it is a plain value, and the run is completed. False: Prefect
        decides what it means, and does what the task has registered for its completion."""
        self.body = plain.body(value.result if isinstance(value, ResultRecord) else value)
        return not (self.job.template.registered.needs_engine or isinstance(value, State) or is_state_iterable(value))

    def note(self, cause: BaseException) -> None:
        self.cause = self.job.overdue(cause) if isinstance(cause, TaskRunTimeoutError) else readable(cause)
        self.use_run_logger()

    def unpersisted(self) -> TaskRunContext:
        """A context in which Prefect does not try to store the exception as if it were a value to be cached."""
        inner = TaskRunContext.get()
        assert inner is not None
        return inner.model_copy(update={"persist_result": False})

    def use_run_logger(self) -> None:
        """Give the engine the run's logger, which is made only when there is something to log."""
        run = self._engine.task_run
        assert run is not None
        self._engine.logger = typing.cast("Any", task_run_logger(task_run=run, task=self.job.task))

    def attempt_result(self) -> AttemptResult:
        state, retries = self._engine.state, self._engine.retries
        if self.is_parked:
            at, why = state.state_details.scheduled_time, failed(self.cause)
            backoff = at.timestamp() - time.time() if at else 0.0
            delay = max(backoff, retry_after(self.cause) or 0.0, 0.0)
            return Retry(why.problem, delay, retries, traceback=why.traceback)
        if not state.is_completed():
            return failed(self.cause, state.message)
        return Succeeded(self.body)

    def retry(self) -> None:
        """Report the failure after which the next attempt is made at once."""
        self.job.retried(self._engine.retries, failed(self.cause))


@dataclass
class _AsyncEngine(_Ours, AsyncTaskRunEngine[Any, Any]):
    async def set_state(self, state: Any, force: bool = False) -> Any:  # noqa: ARG002  # Prefect's signature
        return self.enter(state)

    async def can_retry(self, exc_or_state: Any) -> bool:
        return may_retry(exc_or_state) and await super().can_retry(exc_or_state)

    async def call_hooks(self, state: Any = None) -> None:
        if self.job.template.registered.needs_engine:
            self.use_run_logger()
            await super().call_hooks(state)

    async def call_task_fn(self, transaction: Any) -> Any:
        try:
            result = await (transaction.read() if transaction.is_committed() else self.job.awaited())
        except Overdue as late:
            raise TaskRunTimeoutError from late.__cause__
        await self.handle_success(result, transaction=transaction)
        return result

    async def handle_success(self, result: Any, transaction: Any) -> Any:
        if not self.keep(result):
            return await super().handle_success(result, transaction)
        transaction.stage(None)
        return self.enter(plain.fresh(plain.COMPLETED))

    async def handle_exception(self, exc: Exception) -> None:
        self.note(exc)
        with self.unpersisted():
            await super().handle_exception(exc)

    async def handle_timeout(self, exc: TimeoutError) -> None:
        self.note(exc)
        await super().handle_timeout(exc)

    async def drive(self) -> None:
        """Make the first attempt, or the next one."""
        with self.inside():
            try:
                if self.task_run is not None and self.task_run.state is None:
                    self.enter(plain.fresh(plain.RUNNING))
                    await self.call_hooks()
                await self._attempt()
                if not self.is_parked and self.state.is_final():
                    await self.call_hooks()
            except Exception:
                raise
            except BaseException as stop:
                if is_asked(stop):
                    self.silence(_last_state(stop))
                else:
                    self.note(stop)
                    await self.handle_crash(stop)
                raise

    async def _attempt(self) -> None:
        if not self.job.template.registered.needs_engine:
            return await self._try(AsyncTransaction(logger=_LOGGER, write_on_commit=False))
        async with self.asset_context():
            await self._try(self.transaction_context())
        return None

    async def _try(self, transaction: Any) -> None:
        try:
            async with transaction as entered:
                await self.call_task_fn(entered)
        except CacheAway:  # the store of cached values is away: no fault of the task or the run
            raise
        except TimeoutError as late:
            await self.handle_timeout(late)
        except Exception as error:  # noqa: BLE001  # any exception of the task
            await self.handle_exception(error)


@dataclass
class _SyncEngine(_Ours, SyncTaskRunEngine[Any, Any]):
    def set_state(self, state: Any, force: bool = False) -> Any:  # noqa: ARG002  # Prefect's signature
        return self.enter(state)

    def can_retry(self, exc_or_state: Any) -> bool:
        return may_retry(exc_or_state) and super().can_retry(exc_or_state)

    def call_hooks(self, state: Any = None) -> None:
        if self.job.template.registered.needs_engine:
            self.use_run_logger()
            super().call_hooks(state)

    def call_task_fn(self, transaction: Any) -> Any:
        result = transaction.read() if transaction.is_committed() else self.job.function()()
        self.handle_success(result, transaction=transaction)
        return result

    def handle_success(self, result: Any, transaction: Any) -> Any:
        if not self.keep(result):
            return super().handle_success(result, transaction)
        transaction.stage(None)
        return self.enter(plain.fresh(plain.COMPLETED))

    def handle_exception(self, exc: Exception) -> None:
        self.note(exc)
        with self.unpersisted():
            super().handle_exception(exc)

    def handle_timeout(self, exc: TimeoutError) -> None:
        self.note(exc)
        super().handle_timeout(exc)

    def drive(self) -> None:
        """Make the first attempt, or the next one."""
        with self.inside():
            try:
                if self.task_run is not None and self.task_run.state is None:
                    self.enter(plain.fresh(plain.RUNNING))
                    self.call_hooks()
                self._attempt()
                self._finish()
            except Exception:
                raise
            except BaseException as crash:
                self.note(crash)
                self.handle_crash(crash)
                raise

    def overrun(self) -> None:
        """Record the time-out, in the place of an engine whose thread has been abandoned."""
        with self.inside():
            self.handle_timeout(TaskRunTimeoutError())
            self._finish()

    def _finish(self) -> None:
        if not self._is_silent and not self.is_parked and self.state.is_final():
            self.call_hooks()

    def _attempt(self) -> None:
        if not self.job.template.registered.needs_engine:
            return self._try(Transaction(logger=_LOGGER, write_on_commit=False))
        with self.asset_context():
            self._try(self.transaction_context())
        return None

    def _try(self, transaction: Any) -> None:
        try:
            with timeout(self.task.timeout_seconds, TaskRunTimeoutError), transaction as entered:
                self.call_task_fn(entered)
        except CacheAway:
            raise
        except TimeoutError as late:
            self.handle_timeout(late)
        except Exception as error:  # noqa: BLE001  # any exception of the task
            self.handle_exception(error)


def _last_state(stop: BaseException) -> "State[Any] | None":
    """The state that Prefect should show for a stopped attempt. None when it was lost: another worker has the run and
    publishes its states."""
    match stop.args[:1]:  # see `models.Reason`
        case ("cancelled",):
            return Cancelled(message="Cancelled by request.")
        case ("released",):
            message = "Its worker stopped before it had finished; another one runs it."
            return Pending(name="Released", message=message)
        case _:
            return None


async def call(job: Job, asked: threading.Event, publish: Publish | None) -> AttemptResult:
    """Make the attempt, then each retry that is due at once."""
    telemetry = _TELEMETRY if tracing.parent() is None else RunTelemetry(_enabled=True)
    try:
        return await _call(job, asked, publish, _telemetry=telemetry)
    finally:
        if telemetry.span is not None:  # stopped, or to be retried later
            telemetry.span.end()


async def _call(job: Job, asked: threading.Event, publish: Publish | None, **more: Any) -> AttemptResult:
    if job.task.isasync:
        engine = _AsyncEngine(**_parts(job, publish, **more))
        while True:
            await engine.drive()
            if engine.is_done:
                return engine.attempt_result()
            engine.retry()
    engine = _SyncEngine(**_parts(job, publish, **more))
    while True:
        try:
            await job.threads.run(engine.drive, asked=asked, within=job.within)
        except Overdue:
            engine.silence(None)
            late = {"task_run": engine.task_run, "retries": engine.retries}
            engine = _SyncEngine(**_parts(job, publish, **late, **more))
            await job.threads.aside(engine.overrun)
        except asyncio.CancelledError as stop:
            engine.silence(_last_state(stop))
            raise
        if engine.is_done:
            return engine.attempt_result()
        engine.retry()


def cache_key(job: Job) -> str | None:
    """The cache key, as the engine computes it when the run begins."""
    with plain.context(job, plain.task_run(job)):
        return _SyncEngine(**_parts(job, None)).compute_transaction_key()


def _parts(job: Job, publish: Publish | None, **other: Any) -> dict[str, Any]:
    """The arguments of both engines; their own defaults cost more than a run."""
    return {
        "job": job,
        "publish": publish,
        "task": job.task,
        "parameters": job.parameters,
        "task_run": plain.task_run(job),
        "retries": job.retries,
        "logger": _LOGGER,
        "_telemetry": _TELEMETRY,
        **other,
    }
