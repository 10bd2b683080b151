"""Makes one attempt of a run: on Prefect's task engine, or by a direct call if the task needs nothing of the engine.
Knows nothing of queues, leases or workers.

tests/integration/test_engine_contract.py checks the facts of Prefect that this rests on.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from prefect import Task
from prefect.context import AsyncClientContext, SyncClientContext
from prefect.logging.loggers import patch_print
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE

from backcast.executor import plain, prefect_engine
from backcast.executor.cache import CacheStorage
from backcast.executor.classification import failed, readable
from backcast.executor.objects import CacheAway, Objects
from backcast.executor.plain import Job, Template
from backcast.executor.prefect_engine import Publish
from backcast.executor.registry import prepare
from backcast.executor.threads import Threads
from backcast.models import JSON, AttemptResult, Failed
from backcast.options import stoppable
from backcast.process.marks import Marks

log = logging.getLogger("backcast.worker")


class Executor:
    """The tasks of this process, and the means to execute them. Enter it once, for the life of the worker: one client
    context for all runs keeps HTTP calls off the hot path.

    The function is called directly if two things hold: the run is not published (no `publish`, or its task has
    `history="none"`), and its task uses no feature of Prefect's engine (a cache policy, hooks, assets, names for runs).
    """

    def __init__(
        self,
        tasks: Mapping[str, "Task[..., Any]"],
        *,
        pool: str,
        max_attempts: int,
        store: Objects,
        threads: int,
        publish: Publish | None = None,
        marks: Marks | None = None,
        freed: Callable[[bytes], object] | None = None,
    ):
        """`freed` is called when the last code ends that a run had left."""
        storage = CacheStorage.over(store, asyncio.get_running_loop())
        self.registered = {
            name: prepare(task, pool=pool, max_attempts=max_attempts, storage=storage) for name, task in tasks.items()
        }
        self._publish = publish
        self._threads = Threads(threads, marks, freed)
        self._contexts = contextlib.AsyncExitStack()
        self._templates: dict[str, Template] = {}

    async def __aenter__(self) -> Self:
        client = await self._contexts.enter_async_context(AsyncClientContext.get_or_create())
        self._contexts.enter_context(SyncClientContext.get_or_create())
        # Once for all runs: Prefect patches around each run, and concurrent runs then undo each other's patch.
        self._contexts.enter_context(patch_print())
        for name, registered in self.registered.items():
            for warning in registered.type.warnings:
                log.warning("task %s: %s", name, warning)
            self._templates[name] = await Template.of(registered, client.client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.close()
        await self._contexts.aclose()

    def leave(self, run: bytes) -> bool:
        """The attempt of this run is over: whether code of it goes on."""
        return self._threads.leave(run)

    async def execute(
        self,
        name: str,
        run_id: UUID,
        given: dict[str, JSON],
        *,
        retries: int,
        retried: Callable[[int, Failed], object] = plain.unreported,
    ) -> AttemptResult:
        """Make one attempt, and the retries after it that are due at once; `retries` counts those made before, and
        `retried` is called before each further one, with the new count and the failure.

        Any other exception than these two becomes a `Failed`.

        Raises:
            CancelledError: the attempt was stopped, for the `models.Reason` in it; at once, even if a thread goes on.
            CacheAway: the store of cached values is away.
        """
        asked = stoppable()
        try:
            job = self._job(name, run_id, given, retries)
            job.retried = retried
            publish = self._publish if job.template.registered.options.history == "full" else None
            if publish is None and not job.template.registered.needs_engine:
                return await plain.call(job, asked)
            return await prefect_engine.call(job, asked, publish)
        except asyncio.CancelledError as stop:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return failed(readable(stop))  # no request to stop: something that the task awaited was cancelled
        except CacheAway:
            raise
        except BaseException as error:  # noqa: BLE001  # sys.exit() in a task must not end the worker
            return failed(readable(error))
        finally:
            asked.set()  # code that the task has left running belongs to a run that is over

    def cache_key(self, name: str, run_id: UUID, given: dict[str, JSON]) -> str | None:
        """The cache key of this run, as Prefect's engine computes it. None: the task is not cached, it refreshes its
        cache, or its policy has no key for this input."""
        registered = self.registered[name]
        refresh = registered.task.refresh_cache
        if not registered.is_cached or (PREFECT_TASKS_REFRESH_CACHE.value() if refresh is None else refresh):
            return None
        try:
            return prefect_engine.cache_key(self._job(name, run_id, given, 0))
        except Exception:  # noqa: BLE001  # the attempt will report the error
            return None

    def _job(self, name: str, run_id: UUID, given: dict[str, JSON], retries: int) -> Job:
        return Job(self._threads, self._templates[name], run_id, self.registered[name].bind(given), retries)
