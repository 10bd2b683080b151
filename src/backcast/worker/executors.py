"""Keeps a worker's executors: gives each run to one of them, and replaces those that have died, are full of abandoned
code, or have grown.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any
from uuid import UUID

from backcast.errors import ConfigurationError, Unavailable
from backcast.models import Problem, TaskType
from backcast.process import background, orphans
from backcast.process.metrics import WorkerMetrics
from backcast.process.outages import backoff
from backcast.protocol import Assignment, Attempt, Reports, Served
from backcast.settings import Settings
from backcast.store import Store
from backcast.variables import KEY_VARIABLE, URL_VARIABLE
from backcast.worker.child import Child, ExecutorEnded

log = logging.getLogger("backcast.worker")

BUILTIN = "backcast.llm.tasks"
"""The module of the built-in tasks."""
LOST_SHARE = 4
"""An executor is replaced when one of so many of its slots is lost to code that does not end."""
WORN_SHARE = 10
"""An executor is replaced when less than one of so many of its file descriptors is left."""
THREADS = 500
"""An executor is replaced when it has more threads than these, and three for each of its slots."""
SPARES = 2
"""Executors that are kept ready for runs that get one of their own, once such a run has come."""
QUARANTINES = 4
"""Runs at once that are executed again, each in an executor of its own: any of them may have ended the one before."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_AGAIN = 30.0
"""Seconds until a worn executor is to be replaced again, after its successor could not be started."""
_FAREWELL = 4.0
"""Seconds that an executor has to publish what is left and to end."""
_GENERATIONS = 100
"""How often the end of a worker looks for what runs have left behind, and for what that leaves behind in turn."""
_SECRETS = "(?i:BACKCAST_)|PG(PASSWORD|PASSFILE|SERVICE)"
_IDENTITY = "AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN|WEB_IDENTITY_|CONTAINER_)"
"""By which a store is opened that has no key of its own."""
TOO_LARGE = Problem(
    code="out_of_memory",
    title="The process that executed this run has taken too much memory",
    detail="It was ended at a quarter above worker.max_memory: work on less at a time, or raise the limit.",
)
SIGNALLED = Problem(
    code="signalled_worker",
    title="The run has sent a signal to its worker",
    detail="The signal would have ended the worker, with all runs beside this one. Send signals only to processes that"
    " the task has started.",
)


class Executors:
    def __init__(self, settings: Settings, store: Store, metrics: WorkerMetrics, worker_id: UUID) -> None:
        self._settings, self._store, self._worker = settings, store, worker_id
        worker = settings.worker
        count = min(worker.processes, worker.slots)
        self._seats: list[Child | None] = [None] * count
        self._shares = [worker.slots // count + (seat < worker.slots % count) for seat in range(count)]
        self._most = worker.max_memory
        self._environment = environment(settings)
        self._all = set[Child]()
        """Also retiring ones, replacements on their way, and those apart."""
        self._lives = set[asyncio.Task[None]]()
        self._worn = set[Child]()
        """Those whose successors are starting."""
        self._quarantine = deque[Child]()
        """Ready for the next run that is in quarantine."""
        self._quarantines, self._quarantined = asyncio.Semaphore(QUARANTINES), 0
        self._spares = deque[Child]()
        """For runs that get a process of their own."""
        self._is_closing = False
        self._served = dict[str, Served]()
        self.identity: UUID | None = None
        """Of the ledger: history is published under it."""
        self.reported: Callable[[UUID, Reports], object] | None = None
        """Called with what the code of a run reports."""
        self.changed = asyncio.Event()
        """Set when slots have got free, or an executor is ready or has ended. Whoever waits clears it, looks, and waits
        again."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Has the `ConfigurationError` with which the first executor could not start, or what has ended `run`."""
        self._metrics = metrics
        metrics.show_history(lambda: [child.figures for child in self._all])
        metrics.slots_lost.set_function(lambda: self.left)

    # -- what the worker sees -----------------------------------------------------------------------------------------

    @property
    def types(self) -> list[TaskType]:
        return [served.type for served in self._served.values()]

    @property
    def left(self) -> int:
        """Slots that are taken by code of runs that are over."""
        return sum(child.left for child in self._all)

    @property
    def is_ready(self) -> bool:
        return any(child is not None and child.is_ready for child in self._seats)

    def is_cached(self, task: str) -> bool:
        return self._served[task].is_cached

    async def execute(self, name: str, run: UUID, given: bytes, *, retries: int, is_alone: bool = False) -> Attempt:
        """Make an attempt. A run that may have ended its executor is executed again, with nothing beside it; so is one
        that is to be alone, if there is room, and one whose code goes on although an attempt before is over.

        Raises:
            ExecutorEnded: with its executor; it is known whose doing that was.
        """
        served = self._served[name]
        how = {"may_block": served.may_block or 0.0}
        if served.is_isolated:
            return await self._execute_isolated(name, run, given, retries=retries, **how)
        goes_on = bool(ready := self._ready()) and all(child.has(run) for child in ready)
        if goes_on or (is_alone and not self._quarantines.locked()):
            return await self._execute_quarantined(name, run, given, retries=retries, **how)
        child = await self._free(run)
        try:
            return await child.execute(name, run, given, retries=retries, **how)
        except ExecutorEnded as ended:
            if ended.fault != "unknown":
                raise
            return await self._execute_quarantined(name, run, given, retries=ended.retries, **how)

    async def cache_key(self, name: str, run: UUID, given: bytes, *, retries: int) -> str | None:
        """None as well if it can't be known whose doing the end of an executor was: the attempt will show."""
        child = await self._free(run)
        try:
            return await child.cache_key(name, run, given, retries=retries)
        except ExecutorEnded as ended:
            if ended.fault == "unknown":
                return None
            raise

    def _ready(self) -> list[Child]:
        return [child for child in self._seats if child is not None and child.is_ready]

    async def _free(self, run: UUID) -> Child:
        """The executor with the most room, once there is one that executes nothing of this run any more."""
        while True:
            self.changed.clear()
            ready = [child for child in self._ready() if not child.has(run)]
            best = max(ready, key=lambda child: child.capacity - child.taken, default=None)
            if best is not None and best.taken < best.capacity:
                return best
            await self.changed.wait()

    async def _execute_isolated(self, name: str, run: UUID, given: bytes, **how: Any) -> Attempt:
        while self._spares and self._spares[0].ended.is_set():
            self._spares.popleft()
        child = self._spares.popleft() if self._spares else self._spawn(1)
        try:
            child = await self._started(child)
            if len(self._spares) < SPARES:
                self._spares.append(self._spawn(1))
            return await child.execute(name, run, given, **how)
        finally:
            if child.left:
                child.kill()
            self._retire(child)

    async def _execute_quarantined(self, name: str, run: UUID, given: bytes, **how: Any) -> Attempt:
        self._quarantined += 1
        try:
            async with self._quarantines:
                while self._quarantine and (
                    self._quarantine[0].ended.is_set() or self._is_worn(self._quarantine[0], 0)
                ):
                    self._retire(self._quarantine.popleft())
                if self._quarantine:
                    try:
                        return await self._execute_with(self._quarantine.popleft(), name, run, given, **how)
                    except ExecutorEnded as ended:
                        if ended.fault != "unknown":
                            raise
                        how["retries"] = ended.retries
                # A fresh one: an earlier run may have left behind what ended the other.
                return await self._execute_with(self._spawn(1), name, run, given, **how)
        finally:
            self._quarantined -= 1
            while self._quarantine and not self._quarantined:
                self._retire(self._quarantine.popleft())

    async def _execute_with(self, child: Child, name: str, run: UUID, given: bytes, **how: Any) -> Attempt:
        try:
            child = await self._started(child)
            attempt = await child.execute(name, run, given, **how)
        except BaseException:
            self._retire(child)
            raise
        if child.is_ready and not self._is_worn(child, 0):
            self._quarantine.append(child)
        else:
            self._retire(child)
        return attempt

    # -- their lives --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the executors alive, for ever."""
        try:
            async with asyncio.TaskGroup() as group:
                for seat in range(len(self._seats)):
                    group.create_task(self._keep(seat))
                group.create_task(background.keep("look after the executors", self._look_after))
        except Exception as error:  # noqa: BLE001  # the worker ends with it
            if not self.failed.done():
                self.failed.set_exception(error)

    async def _keep(self, seat: int) -> None:
        delays = backoff(0.5, 30.0)
        while not self._is_closing:
            began = time.monotonic()
            child = self._seats[seat] = self._spawn(self._shares[seat])
            while not child.ended.is_set():
                self.changed.clear()
                await self.changed.wait()
                child = self._seats[seat] or child  # its successor, if it was replaced
            if self._is_closing:
                return
            if child.served is None or time.monotonic() - began < 1.0:
                await asyncio.sleep(next(delays))
            else:
                delays = backoff(0.5, 30.0)

    def _spawn(self, slots: int) -> Child:
        settings = self._settings
        child = Child(
            Assignment(
                tasks=[*([BUILTIN] if settings.builtin_tasks else []), *settings.tasks],
                pool=settings.worker.pool,
                max_attempts=settings.max_attempts,
                slots=slots,
                max_result=settings.max_result,
                log_level=settings.log_level,
                log_format=settings.log_format,
                worker=str(self._worker),
                prefect=settings.prefect,
                model=settings.model,
                tracing=settings.tracing,
            ),
            self._environment,
            self._store,
            start=settings.worker.start.total_seconds(),
            stall=settings.worker.stall.total_seconds(),
            identity=lambda: self.identity,
            changed=self._has_changed,
            dropped=self._metrics.history_dropped,
            reported=lambda run, given: self.reported and self.reported(run, given),
        )
        self._all.add(child)
        self._begin(self._live(child))
        return child

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._lives.add(task)
        task.add_done_callback(self._lives.discard)

    async def _live(self, child: Child) -> None:
        try:
            await child.run()
            if child.served is None and not self._served and not self._is_closing:
                raise ConfigurationError(
                    "The tasks can't be served: the process that imports them has ended; see above."
                )
        except ConfigurationError as error:
            if self._served:
                log.error("an executor can't be started: %s", error.detail)
            elif not self.failed.done():
                self.failed.set_exception(error)
        except OSError as error:
            log.error("an executor can't be started: %s", error)
        finally:
            self._all.discard(child)
            if child.cause is not None:
                self._metrics.executors_ended.labels(child.cause).inc()
            child.ended.set()
            self._has_changed()

    def _has_changed(self) -> None:
        for child in self._all:
            if child.served is not None and not self._served:
                self._served = {served.type.name: served for served in child.served}
        self.changed.set()

    async def _started(self, child: Child) -> Child:
        while child.served is None and not child.ended.is_set():
            self.changed.clear()
            await self.changed.wait()
        if child.ended.is_set():
            raise Unavailable("No executor can be started: see the log of the worker.")
        return child

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._end_orphans()
            sizes = await asyncio.to_thread(self._sizes, self._most) if self._most else {}
            for child, used in sizes.items():
                if self._most and used > 1.25 * self._most and not child.ended.is_set():
                    log.error("ending executor %s: it has %d MiB", child.pid, used >> 20)
                    child.end(TOO_LARGE)
            for seat, child in enumerate(self._seats):
                if child is None or not child.is_ready or child in self._worn:
                    continue
                if why := self._is_worn(child, sizes.get(child, 0)):
                    log.warning("replacing executor %s: %s", child.pid, why)
                    self._worn.add(child)
                    self._begin(self._replace(seat, child))

    async def _replace(self, seat: int, child: Child) -> None:
        try:
            fresh = await self._started(self._spawn(child.capacity))
        except Unavailable:  # the log has the reason
            await asyncio.sleep(_AGAIN)
            return
        finally:
            self._worn.discard(child)
        if self._seats[seat] is not child:  # it has ended meanwhile, and has a successor already
            self._retire(fresh)
            return
        self._seats[seat] = fresh
        self._retire(child)
        self._metrics.executors_ended.labels("replaced").inc()

    def refuse(self, senders: Collection[int]) -> bool:
        """End the executor among these processes, if there is one: it, or a process of its runs, has sent a signal that
        ends workers. Such a run would do the same to the next worker. What it has left behind is a process of ours."""
        for child in self._all:
            if child.pid in senders:
                log.error("ending executor %s: it has sent a signal to the worker", child.pid)
                child.end(SIGNALLED)
                return True
        if is_ours := os.getpid() in senders:
            self._end_orphans()
        return is_ours

    def _end_orphans(self) -> bool:
        """What runs have left behind ends with their executor, in whatever session it is. Returns whether there was
        anything."""
        pids = [child.pid for child in self._all]
        # One that starts would be taken for an orphan.
        return None not in pids and orphans.end([pid for pid in pids if pid is not None])

    def _sizes(self, most: int) -> dict[Child, int]:
        """Bytes of memory of each executor."""
        return {child: memory(child.pid, most) for child in list(self._all) if child.pid is not None}

    def _is_worn(self, child: Child, used: int) -> str:
        worker = self._settings.worker
        if child.left * LOST_SHARE >= child.capacity:
            return f"{child.left} of its {child.capacity} slots are lost to code that does not end"
        if worker.max_runs_per_process and child.runs >= worker.max_runs_per_process:
            return f"it has made {child.runs} attempts"
        if self._most and used > self._most:
            return f"it has {used >> 20} MiB"
        if (files := _descriptors(child.pid)) and files[0] * WORN_SHARE > files[1] * (WORN_SHARE - 1):
            return f"{files[0]} of its {files[1]} file descriptors are open"
        if (threads := _threads(child.pid)) > THREADS + 3 * child.capacity:
            return f"it has {threads} threads"
        return child.worn

    def _retire(self, child: Child) -> None:
        """It gets no more runs, and ends when those that it has are over."""
        child.is_retiring = True

        async def end() -> None:
            while child.taken > child.left and not child.ended.is_set():
                self.changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), 0.5)
            child.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.ended.wait(), _FAREWELL)
            child.kill()
            await child.ended.wait()

        self._begin(end())

    async def aclose(self, *, by: float | None = None) -> None:
        """End all executors, whatever their code does, by this moment of the monotonic clock."""
        self._is_closing = True
        within = _FAREWELL if by is None else max(0.0, min(_FAREWELL, by - time.monotonic()))
        children = list(self._all)
        for child in children:
            child.close()
        ended = asyncio.gather(*(child.ended.wait() for child in children))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended, within)
        for child in children:
            child.kill()
        await asyncio.wait({*self._lives, asyncio.create_task(asyncio.sleep(0))}, timeout=2)
        for _ in range(_GENERATIONS):
            if not self._end_orphans():
                break
            await asyncio.sleep(0.01)  # they have ended then, or soon


def environment(settings: Settings) -> dict[str, str]:
    """What executors see of our own: no password, and no key but one for `backcast.delay`, for which alone a worker is
    given a key of the API."""
    stores = [each for each in (settings.store, settings.store.fallback) if (each.url or "").startswith("s3:")]
    withheld = re.compile("|".join([_SECRETS, *(_IDENTITY for each in stores if each.access_key is None)]))
    return {
        name: value
        for name, value in os.environ.items()
        if name in (URL_VARIABLE, KEY_VARIABLE) or not withheld.match(name)
    }


def _descriptors(pid: int | None) -> tuple[int, int] | None:
    """How many a process has open, and may have; None where the system does not show it."""
    try:
        open_, limits = len(os.listdir(f"/proc/{pid}/fd")), Path(f"/proc/{pid}/limits").read_text()  # noqa: PTH208
        return open_, int(limits.partition("Max open files")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _threads(pid: int | None) -> int:
    """How many a process has; 0 where the system does not show it."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208
    except OSError:
        return 0


def memory(pid: int, limit: int) -> int:
    """Bytes of memory that a process and its descendants have; 0 where the system does not show it. Above the limit, a
    page that several of them share, as forks do, counts once: that costs a look at each page, about 10 ms for a GiB."""
    tree = [pid, *orphans.descendants(pid)]
    used = sum(map(_resident, tree))
    return used if used <= limit or len(tree) == 1 else sum(map(_share, tree))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _share(pid: int) -> int:
    """Of the memory of a process: a page that is mapped by n processes counts as one nth of it."""
    try:
        return int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\nPss:")[2].split()[0]) << 10
    except (OSError, IndexError):
        return _resident(pid)
