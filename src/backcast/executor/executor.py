"""Makes one attempt of a run: on Prefect's own task engine, or by calling the function where nothing of the engine is
asked for. Knows nothing of queues, leases or workers.

The facts of Prefect 3.8.8 that this rests on are held by tests/integration/test_engine_contract.py.
"""

import asyncio
import contextlib
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from prefect import Task
from prefect.context import AsyncClientContext, SyncClientContext
from prefect.logging.loggers import patch_print
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE

from backcast.errors import Unavailable
from backcast.executor import plain, prefect_engine
from backcast.executor.cache import CacheStorage
from backcast.executor.classification import problem
from backcast.executor.plain import Job, Template
from backcast.executor.prefect_engine import Publish
from backcast.executor.registry import register
from backcast.executor.threads import Threads
from backcast.models import JSON, AttemptResult, Failed, TaskType
from backcast.options import stoppable
from backcast.store import Store


class Executor:
    """The tasks of this process and the means to run them. Enter it once, for the life of the worker: one client
    context for all runs is what keeps HTTP calls off the hot path.

    Where nobody is told of a run (no `publish`, or its task has `history="none"`) and its task asks for nothing that only
    Prefect's engine does (a cache policy, hooks, assets, names for runs), the function is called directly.
    """

    def __init__(
        self,
        tasks: Mapping[str, "Task[..., Any]"],
        *,
        pool: str,
        max_attempts: int,
        store: Store,
        threads: int,
        publish: Publish | None = None,
    ):
        storage = CacheStorage.over(store, asyncio.get_running_loop())
        self.registered = {
            name: register(task, pool=pool, max_attempts=max_attempts, storage=storage)
            for name, task in tasks.items()
            if not task.isgenerator  # a stream of values has no place to go yet
        }
        self._publish = publish
        self._threads = Threads(threads)
        self._contexts = contextlib.AsyncExitStack()
        self._templates: dict[str, Template] = {}

    @property
    def names(self) -> Collection[str]:
        return self.registered.keys()

    @property
    def types(self) -> list[TaskType]:
        return [registered.type for registered in self.registered.values()]

    @property
    def threads_busy(self) -> int:
        """Threads that run user code, those included that nobody waits for any more."""
        return self._threads.busy

    @property
    def threads_abandoned(self) -> int:
        """Threads that still run the code of attempts that are over: cancelled, handed back, or too slow."""
        return self._threads.abandoned

    async def __aenter__(self) -> Self:
        client = await self._contexts.enter_async_context(AsyncClientContext.get_or_create())
        self._contexts.enter_context(SyncClientContext.get_or_create())
        # Once and for all: Prefect does it around each run, and runs side by side then undo each other's.
        self._contexts.enter_context(patch_print())
        for name, registered in self.registered.items():
            self._templates[name] = await Template.of(registered, client.client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.close()
        await self._contexts.aclose()

    async def execute(self, name: str, run_id: UUID, given: dict[str, JSON], *, retries: int) -> AttemptResult:
        """Make one attempt, and those after it that are due at once; `retries` is how many were made before.

        Raises nothing but the `CancelledError` of whoever stops it, with a `models.Reason`: at once, also where a
        thread goes on; and `Unavailable` when the store of cached values is away.
        """
        try:
            with stoppable() as asked:
                try:
                    job = self._job(name, run_id, given, retries)
                    publish = self._publish if job.template.registered.options.history == "full" else None
                    if publish is None and not job.template.registered.needs_engine:
                        return await plain.call(job, self._threads, asked)
                    return await prefect_engine.call(job, self._threads, asked, publish)
                finally:
                    asked.set()  # what the task has left running belongs to a run that is over
        except asyncio.CancelledError as stop:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return Failed(problem(stop))  # nobody asked: something that the task awaited was cancelled
        except Unavailable:
            raise
        except BaseException as error:  # noqa: BLE001  # sys.exit() in a task must not end the worker
            return Failed(problem(error))

    def cache_key(self, name: str, run_id: UUID, given: dict[str, JSON]) -> str | None:
        """The key of the value that this run would take or leave in the cache, as Prefect's engine reckons it. None:
        the task is not cached, wants no cached value, or its policy has no key for this input."""
        registered = self.registered[name]
        refresh = registered.task.refresh_cache
        if not registered.is_cached or (PREFECT_TASKS_REFRESH_CACHE.value() if refresh is None else refresh):
            return None
        try:
            return prefect_engine.cache_key(self._job(name, run_id, given, 0))
        except Exception:  # noqa: BLE001  # the attempt will say what is wrong
            return None

    def _job(self, name: str, run_id: UUID, given: dict[str, JSON], retries: int) -> Job:
        return Job(self._templates[name], run_id, self.registered[name].bind(given), retries)
