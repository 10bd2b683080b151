"""Makes an attempt by a direct call of the task's function, for a twentieth of the cost of Prefect's engine. Retries,
time-outs, error kinds, results, and the run that a task finds through Prefect are the same as on the engine (one test
suite checks both). No states are published; there are no hooks, caching or transactions.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self, cast
from uuid import UUID

from prefect import Task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State, TaskRun, TaskRunPolicy
from prefect.context import TaskRunContext
from prefect.results import ResultStore  # pyright: ignore[reportPrivateImportUsage]
from prefect.states import Completed, Running
from prefect.task_engine import AsyncTaskRunEngine, SyncTaskRunEngine, TaskRunTimeoutError
from prefect.types._datetime import now  # pyright: ignore[reportPrivateUsage]  # tasks may use methods of its DateTime
from prefect.utilities.callables import call_with_parameters
from prefect.utilities.math import clamped_poisson_interval
from prefect.utilities.timeout import timeout
from pydantic import BaseModel

from backcast.errors import FatalError, RunTimeout
from backcast.executor.classification import failed, may_retry, readable, retry_after
from backcast.executor.registry import RegisteredTask
from backcast.executor.threads import Overdue, Threads
from backcast.executor.values import to_json
from backcast.models import AttemptResult, Failed, Retry, Succeeded, uuid7

MARGIN = 0.5
"""Seconds after its time-out that a thread has to end by itself, before it is abandoned."""


RUNNING, COMPLETED = Running(), Completed()


class Context(TaskRunContext):
    """A run's context. Sent elsewhere, by `.delay()` and `with_context`, it is as in plain Prefect: it has the user's
    task, and not our store, which only this process has."""

    given: Any

    def serialize(self, include_secrets: bool = True) -> dict[str, Any]:
        plain = self.model_copy(update={"task": self.given, "result_store": ResultStore()})
        return TaskRunContext.serialize(plain, include_secrets)


@dataclass(frozen=True, slots=True)
class Template:
    """A served task, with the models that Prefect's contexts need for its runs. Making and validating a model takes
    longer than a run, so each run takes copies."""

    registered: RegisteredTask
    context: TaskRunContext

    @classmethod
    async def of(cls, registered: RegisteredTask, client: PrefectClient) -> Self:
        task = registered.task
        run = TaskRun(
            name=task.name,
            task_key=task.task_key,
            dynamic_key="",
            task_version=task.version,
            empirical_policy=TaskRunPolicy(retries=task.retries, retry_delay=task.retry_delay_seconds),
        )
        context = Context(
            given=registered.given,
            task=task,
            task_run=run,
            parameters={},
            log_prints=registered.log_prints,
            result_store=await ResultStore().aupdate_for_task(task),
            persist_result=registered.is_cached,
            client=client,
        )
        return cls(registered, context)


def unreported(_count: int, _why: Failed) -> None:
    """For callers to whom a retry makes no difference."""


@dataclass(slots=True)
class Job:
    """A run of which attempts are made; `retries` counts the retries so far."""

    threads: Threads
    template: Template
    run_id: UUID
    parameters: dict[str, Any]
    retries: int
    retried: Callable[[int, Failed], object] = unreported
    """Called before each retry that is made at once, with their count and the failure before it."""

    @property
    def task(self) -> "Task[..., Any]":
        return self.template.registered.task

    @property
    def within(self) -> float | None:
        """Seconds after which the thread of a sync task is abandoned. Before that Prefect raises in the thread, which
        ends everything except one blocking call (`time.sleep(60)`, a long query). Coroutines have as long to end."""
        return None if self.task.timeout_seconds is None else self.task.timeout_seconds + MARGIN

    def overdue(self, where: BaseException | None = None) -> RunTimeout:
        """`where` has the frames of the code that took too long."""
        late = RunTimeout(f"Task run exceeded timeout of {self.task.timeout_seconds} second(s)")
        late.__cause__ = where
        return late

    def function(self) -> Callable[[], Any]:
        if self.template.registered.is_by_name:
            return lambda: self.task.fn(**self.parameters)
        return lambda: call_with_parameters(self.task.fn, self.parameters)

    async def awaited(self) -> Any:
        """The value of an async task. Raises `Overdue`."""
        if (limit := self.task.timeout_seconds) is None:
            return await self.function()()
        return await self.threads.wait(self.function()(), within=limit, margin=MARGIN)

    def keeps_slot(self, cause: BaseException | None) -> bool:
        """Whether code may go on that was too late: the next attempt is not made beside it in this process."""
        is_late = isinstance(cause, RunTimeout)
        return is_late and (not self.task.isasync or self.threads.goes_on(self.run_id.bytes))


def fresh(state: "State[Any]", at: datetime | None = None) -> "State[Any]":
    """A copy of this state, entered then, or now."""
    at = at or now("UTC")
    details = BaseModel.model_copy(state.state_details)
    changed = {"id": uuid7(), "timestamp": at, "created": at, "updated": at, "state_details": details}
    return cast("State[Any]", BaseModel.model_copy(state, update=changed))  # Prefect's own copy takes ten times as long


def task_run(job: Job, at: datetime | None = None) -> TaskRun:
    """Prefect's record of the run, as its engine would create it then, or now."""
    at = at or now("UTC")
    changed = {
        "id": job.run_id,
        "dynamic_key": f"{job.task.task_key}-{job.run_id}",
        "task_inputs": {name: [] for name in job.parameters},
        "tags": [],
        "labels": {},
        "run_count": job.retries,
        "expected_start_time": at,
        "created": at,
        "updated": at,
    }
    return cast("TaskRun", BaseModel.model_copy(job.template.context.task_run, update=changed))


def context(job: Job, run: TaskRun) -> TaskRunContext:
    """The context in which `get_run_logger`, `prefect.runtime` and the tasks that a task calls find their run."""
    changed = {"task_run": run, "parameters": job.parameters, "start_time": run.start_time or now("UTC")}
    return job.template.context.model_copy(update=changed)


def body(value: Any) -> bytes:
    """The JSON of a task's return value, which may be a completed state that holds the value."""
    if isinstance(value, State):
        given = cast("State[Any]", value)
        if not given.is_final():
            raise FatalError(f"The task returned the state {given.name}: return a value, or a final state.")
        value = getattr(given.data, "result", given.data) if given.is_completed() else None
    return to_json(value)


async def call(job: Job, asked: threading.Event) -> AttemptResult:
    """Make the attempt, then each retry that is due at once. Raises no `Exception`, only other `BaseException`s."""
    at: datetime | None = now("UTC")
    task, run = job.task, task_run(job, at)
    while True:
        run.state, at = fresh(RUNNING, at), None
        run.state_type, run.state_name, run.start_time = (
            run.state.type,
            run.state.name,
            cast("Any", run.state.timestamp),
        )
        run.run_count = job.retries + 1
        ended = await (_in_loop(job, run) if task.isasync else _in_thread(job, run, asked))
        if isinstance(ended, bytes):
            return Succeeded(ended)
        state, cause = (ended, None) if isinstance(ended, State) else (None, ended)
        why = failed(cause, state and state.message)
        if not isinstance(ended, (Exception, State)) or not await _goes_on(job, run, ended):
            return why
        job.retries += 1
        if task.retry_delay_seconds or retry_after(cause) is not None or job.keeps_slot(cause):
            delay = max(_backoff(task, job.retries), retry_after(cause) or 0.0)
            return Retry(why.problem, delay, job.retries, traceback=why.traceback)
        job.retried(job.retries, why)


Ended = bytes | BaseException | State[Any]
"""The JSON of the function's value, its exception, or the state that it returned in place of a value."""


def _ended(value: Any) -> Ended:
    if isinstance(value, State) and value.is_final() and not value.is_completed():
        return cast("State[Any]", value)
    return body(value)


async def _in_loop(job: Job, run: TaskRun) -> Ended:
    with context(job, run):
        try:
            return _ended(await job.awaited())
        except Overdue as late:
            return job.overdue(late.__cause__)
        except Exception as error:  # noqa: BLE001  # any exception of a task becomes the run's problem
            return readable(error)


async def _in_thread(job: Job, run: TaskRun, asked: threading.Event) -> Ended:
    def work() -> Ended:
        with context(job, run):
            try:
                with timeout(job.task.timeout_seconds, TaskRunTimeoutError):
                    return _ended(job.function()())
            except TaskRunTimeoutError as late:
                return job.overdue(late)
            except BaseException as error:  # noqa: BLE001  # a future can't carry all of them
                return readable(error)

    try:
        return await job.threads.run(work, asked=asked, within=job.within)
    except Overdue:
        return job.overdue()


async def _goes_on(job: Job, run: TaskRun, ended: "Exception | State[Any]") -> bool:
    task = job.task
    if (isinstance(ended, State) and not ended.is_failed()) or job.retries >= task.retries or not may_retry(ended):
        return False
    if task.retry_condition_fn is None:
        return True
    if task.isasync:
        return await AsyncTaskRunEngine(task=task, task_run=run).can_retry(ended)
    engine = SyncTaskRunEngine(task=task, task_run=run)
    return await job.threads.aside(lambda: engine.can_retry(ended))


def _backoff(task: "Task[..., Any]", retry: int) -> float:
    """Seconds before the n-th retry, as Prefect computes them."""
    given = task.retry_delay_seconds or 0.0
    delay = given[min(retry, len(given)) - 1] if isinstance(given, list) else float(given)
    if task.retry_jitter_factor and delay > 0:
        return clamped_poisson_interval(delay, clamping_factor=task.retry_jitter_factor)
    return delay
