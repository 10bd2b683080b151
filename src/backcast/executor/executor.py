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
from backcast.executor.plain import Job, Kit
from backcast.executor.prefect_engine import Tell
from backcast.executor.registry import serve
from backcast.executor.threads import Threads
from backcast.models import JSON, Attempt, Failed, TaskType
from backcast.options import stoppable
from backcast.store import Store


class Engine:
    """The tasks of this process and the means to run them. Enter it once, for the life of the worker: one client
    context for all runs is what keeps HTTP calls off the hot path.

    Where nobody is told of a run (no `tell`, or its task has `history="none"`) and its task asks for nothing that only
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
        tell: Tell | None = None,
    ):
        storage = CacheStorage.over(store, asyncio.get_running_loop())
        self.served = {
            name: serve(task, pool=pool, max_attempts=max_attempts, storage=storage)
            for name, task in tasks.items()
            if not task.isgenerator  # a stream of values has no place to go yet
        }
        self._tell = tell
        self._threads = Threads(threads)
        self._contexts = contextlib.AsyncExitStack()
        self._kits: dict[str, Kit] = {}

    @property
    def names(self) -> Collection[str]:
        return self.served.keys()

    @property
    def types(self) -> list[TaskType]:
        return [served.type for served in self.served.values()]

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
        for name, served in self.served.items():
            self._kits[name] = await Kit.of(served, client.client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.close()
        await self._contexts.aclose()

    async def execute(self, name: str, run_id: UUID, given: dict[str, JSON], *, retries: int) -> Attempt:
        """Make one attempt, and those after it that are due at once; `retries` is how many were made before.

        Raises nothing but the `CancelledError` of whoever stops it, with a `models.Reason`: at once, also where a
        thread goes on; and `Unavailable` when the store of cached values is away.
        """
        try:
            with stoppable() as asked:
                try:
                    job = self._job(name, run_id, given, retries)
                    tell = self._tell if job.kit.served.options.history == "full" else None
                    if tell is None and not job.kit.served.needs_engine:
                        return await plain.call(job, self._threads, asked)
                    return await prefect_engine.call(job, self._threads, asked, tell)
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
        served = self.served[name]
        refresh = served.task.refresh_cache
        if not served.is_cached or (PREFECT_TASKS_REFRESH_CACHE.value() if refresh is None else refresh):
            return None
        try:
            return prefect_engine.cache_key(self._job(name, run_id, given, 0))
        except Exception:  # noqa: BLE001  # the attempt will say what is wrong
            return None

    def _job(self, name: str, run_id: UUID, given: dict[str, JSON], retries: int) -> Job:
        return Job(self._kits[name], run_id, self.served[name].bind(given), retries)
