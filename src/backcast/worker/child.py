"""Runs one executor process: starts it, gives it runs, watches that its loop answers, and ends it with all it has left.

Decides when an executor has to end; `blame` decides whose doing it was.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import IO, Literal
from uuid import UUID

from backcast import protocol
from backcast.errors import ConfigurationError, StoreUnavailable
from backcast.models import Problem
from backcast.process import background, marks, tracing
from backcast.process.channel import Channel, Message
from backcast.protocol import Assignment, Attempt, Reports, Served
from backcast.store import Missing, Store
from backcast.worker import blame
from backcast.worker.blame import Activity, Evidence, Fault

log = logging.getLogger("backcast.worker")

PING = 0.5
"""Seconds between two pings."""
DUMP_WITHIN = 3.0
"""Seconds that a process has to write its dump, and to end by itself, after the signal for that."""
DUMP = 1 << 20
"""Bytes of a dump at most."""
STOP_WITHIN = 2.0
"""Seconds that the code of a run has to end after it was asked to; then it no longer matters to the run."""
_CAUSES: Mapping[str, Literal["stall", "memory"]] = {"blocked_worker": "stall", "out_of_memory": "memory"}
"""Of the end of an executor, by the code that its runs get."""


class ExecutorEnded(Exception):
    """The executor of a run has ended before the run."""

    def __init__(self, problem: Problem, fault: Fault, retries: int) -> None:
        super().__init__(problem.code)
        self.problem, self.fault, self.retries = problem, fault, retries


@dataclass(slots=True)
class _Job:
    ended: asyncio.Future[Attempt]
    retries: int
    stall: float


@dataclass(slots=True)
class _Watch:
    """What the supervisor knows of the loop of an executor."""

    sent: int = 0
    answered: int = 0
    silent: float = 0.0
    """Seconds without an answer, or until it is ready. Only time in which we ourselves ran: both may have been stopped
    together."""
    before: Activity = field(default_factory=Activity)
    """When the silence began."""
    leave: float = 0.0
    """Seconds that those who seemed to block it, when last looked at, may do that."""


class Child:
    """Start it, and wait for `ended`, which is set once the process and its group are gone."""

    def __init__(
        self,
        assignment: Assignment,
        environment: Mapping[str, str],
        store: Store,
        *,
        start: float,
        stall: float,
        identity: Callable[[], UUID | None],
        changed: Callable[[], object],
        dropped: Callable[[str, float], object],
        reported: Callable[[UUID, Reports], object],
    ) -> None:
        """`changed` is called whenever a slot gets free, and when the child is ready or has ended; `dropped` with the
        reason and the number of items that its history sink has dropped; `reported` with what the code of a run
        reports."""
        self.capacity = assignment.slots
        self._assignment, self._environment, self._store = assignment, environment, store
        self._start, self._stall = start, stall
        self._identity, self._changed, self._dropped, self._reported = identity, changed, dropped, reported
        self._jobs = dict[UUID, _Job]()
        self._left = dict[UUID, _Job]()
        """Those whose run is settled or stopped, but whose code may go on: each still takes a slot."""
        self._keys = dict[UUID, tuple[asyncio.Future[str | None], int]]()
        self._had = set[UUID]()
        """The runs that it got: the first two are enough."""
        self._requests = set[asyncio.Task[None]]()
        self._watch = _Watch()
        self._evidence: Evidence | None = None
        self._end: Problem | None = None
        self._marks: IO[bytes]
        self._dump: IO[bytes]
        self._channel: Channel | None = None
        self._has_tag = False
        self._refusal: str | None = None
        self.served: list[Served] | None = None
        """Set once it is ready."""
        self.figures: dict[str, float] = {}
        """Of its history sink."""
        self._counted = dict[str, float]()
        self.worn = ""
        """Why it has to be replaced, as it says itself, or ""."""
        self.is_retiring = False
        """It gets no more runs."""
        self.runs = 0
        """How many it was given."""
        self.cause: Literal["stall", "memory", "died"] | None = None
        """Why it has ended, if nobody has asked it to."""
        self.ended = asyncio.Event()
        self.pid: int | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Live from the start of the process to its end.

        Raises:
            ConfigurationError: it can't serve the tasks.
            OSError: the process can't be started.
        """
        with _shared("marks", marks.size(self._assignment.slots)) as self._marks, _shared("dump", DUMP) as self._dump:
            await self._run()

    async def _run(self) -> None:
        ours, theirs = socket.socketpair()
        files = (theirs.fileno(), self._marks.fileno(), self._dump.fileno())
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.callback(ours.close)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "backcast.executor.main", *map(str, files)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=files,
                env=self._environment,
                start_new_session=True,
            )
            unless_started.pop_all()
        self.pid = process.pid
        watching = None
        try:
            most = protocol.largest(self._assignment.max_result)
            self._channel = await Channel.over(ours, self._received, largest=most)
            self._channel.send(self._assignment.message())
            watching = asyncio.create_task(background.keep("watch an executor", self._keep_watch))
            gone = asyncio.create_task(self._channel.lost.wait())
            waiting = asyncio.create_task(process.wait())
            await asyncio.wait({gone, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():  # it has closed the channel: it ends, or user code did it
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(waiting), 1.0)
            gone.cancel()
        finally:
            if watching is not None:
                watching.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what runs have left behind
            code = await process.wait()
            self._has_ended(code)
        if self._refusal is not None:
            raise ConfigurationError(self._refusal)

    def close(self) -> None:
        """Ask it to end; it still reports what it has."""
        self.is_retiring = True
        if self._channel is not None:
            self._channel.send(Message(protocol.CLOSE))

    def end(self, problem: Problem) -> None:
        """End it at once; any of its runs may have been at fault."""
        self._end = problem
        self._evidence = Evidence(marks.read(self._marks.fileno(), self._assignment.slots))
        self.kill()

    def kill(self) -> None:
        if self.pid is not None and not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _has_ended(self, code: int) -> None:
        seen = marks.read(self._marks.fileno(), self._assignment.slots)
        evidence = replace(self._evidence or Evidence(seen), dump=self._dumped(), is_only=self._has_one)
        problem = self._end or Problem(
            code="executor_died",
            title="The process that executed this run has ended",
            detail=f"It ended {_how(code)}. Code of a task did that, or the machine was short of memory.",
        )
        faults = blame.faults({*self._jobs, *self._left, *self._keys}, evidence)
        if (self.served is not None or self._end is not None) and (self.taken or not self.is_retiring):
            self.cause = _CAUSES.get(problem.code, "died")
            own = [run for run, fault in faults.items() if fault == "own"]
            log.error(
                "executor %s ended %s, with %d runs; at fault: %s\n%s",
                *(self.pid, _how(code), self.taken),
                ", ".join(map(str, own)) or "not known",
                blame.stack(evidence.dump, evidence.marks, own[0] if own else None),
            )
        for run, job in self._jobs.items():
            if not job.ended.done():
                stack = blame.stack(evidence.dump, evidence.marks, run) if faults[run] == "own" else ""
                with_stack = problem.model_copy(update={"detail": f"{problem.detail}\n{stack}".strip()})
                job.ended.set_exception(ExecutorEnded(with_stack, faults[run], self._retries(run, job)))
                job.ended.exception()  # its run may have been stopped, so that nobody asks
        for run, (key, retries) in self._keys.items():
            if not key.done():
                key.set_exception(ExecutorEnded(problem, faults[run], retries))
                key.exception()
        self._jobs.clear()
        self._left.clear()
        if self._channel is not None:
            self._channel.close()
        self.ended.set()
        self._changed()

    def _retries(self, run: UUID, job: _Job) -> int:
        """How many have begun; its own report may never come."""
        return max(job.retries, marks.retries(self._marks.fileno(), self._assignment.slots).get(run, 0))

    def _dumped(self) -> str:
        return os.pread(self._dump.fileno(), DUMP, 0).rstrip(b"\0").decode(errors="replace")

    # -- watching -----------------------------------------------------------------------------------------------------

    async def _keep_watch(self) -> None:
        watch = self._watch
        before = time.monotonic()
        while True:
            await asyncio.sleep(PING)
            now = time.monotonic()
            if self.served is not None and self._channel is not None and watch.answered == watch.sent:
                self._send_tag()
                watch.silent = 0.0
                watch.sent += 1
                self._channel.send(Message(protocol.PING, number=watch.sent))
            else:
                if watch.silent == 0.0 and self.pid is not None:
                    watch.before, watch.leave = blame.activity(self.pid), self._stall
                watch.silent += min(now - before, 2 * PING)
                if self.served is not None and watch.silent >= self._stall:
                    await self._judge()
                elif self.served is None and watch.silent >= self._start:
                    log.error("ending executor %s: it has not imported the tasks within %g s", self.pid, self._start)
                    await self._abort(self._start, Evidence([]))
            before = now

    async def _judge(self) -> None:
        """The loop is silent for longer than any run may block it. A run that has leave to block it for longer gives
        that leave to no other."""
        assert self.pid is not None
        watch, silence = self._watch, blame.activity(self.pid).since(self._watch.before)
        evidence = Evidence(marks.read(self._marks.fileno(), self._assignment.slots), silence=silence)
        faults = blame.faults({*self._jobs, *self._left, *self._keys}, evidence)
        jobs = (self._jobs | self._left).items()
        limit = max([self._stall, *(job.stall for run, job in jobs if faults[run] != "other")])
        if limit < watch.leave:  # another one has begun to block it, and gets its own time
            watch.silent = 0.0
        elif watch.silent >= limit:
            await self._abort(limit, evidence)
        else:
            watch.leave = limit

    async def _abort(self, limit: float, evidence: Evidence) -> None:
        """End a process whose loop does not answer: first by a signal that makes it dump its threads, whatever holds
        the interpreter's lock."""
        assert self.pid is not None
        self._end = Problem(
            code="blocked_worker",
            title="The run has blocked the process that executed it",
            detail=f"Its event loop did not answer for {limit:g} s, so the process was ended: use `await`, a sync"
            " task, or shorter steps.",
        )
        self._evidence = evidence
        if blame.can_dump(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGABRT)
            await asyncio.sleep(DUMP_WITHIN)  # its end, which comes as soon as it has written the dump, ends this
        self.kill()

    def _send_tag(self) -> None:
        if not self._has_tag and self._channel is not None and (identity := self._identity()) is not None:
            self._has_tag = True
            self._channel.send(Message(protocol.TAG, identity.bytes))

    # -- runs ---------------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        return self.served is not None and not self.is_retiring and not self.ended.is_set()

    @property
    def taken(self) -> int:
        """Runs whose code may be executing, over or not."""
        return len(self._jobs) + len(self._left)

    @property
    def left(self) -> int:
        """Those of them that are over: their code has not ended when it was asked to."""
        return len(self._left)

    def has(self, run: UUID) -> bool:
        """Whether code of the run may be executing."""
        return run in self._jobs or run in self._left

    def _gets(self, run: UUID) -> None:
        if len(self._had) < 2:
            self._had.add(run)

    @property
    def _has_one(self) -> bool:
        """Whether it never had another run than the one that it has."""
        return len(self._had) == 1

    async def execute(self, name: str, run: UUID, given: bytes, *, retries: int, may_block: float = 0.0) -> Attempt:
        """Make an attempt.

        Cancelled, it returns as well: once the code of the run has ended, or after `STOP_WITHIN`.

        Raises:
            ExecutorEnded: the process has ended.
        """
        assert self._channel is not None
        job = self._jobs[run] = _Job(asyncio.get_running_loop().create_future(), retries, may_block)
        self.runs += 1
        self._gets(run)
        if (traceparent := tracing.parent()) is not None:
            self._channel.send(Message(protocol.TRACE, run.bytes, meta=traceparent.encode()))
        self._channel.send(Message(protocol.EXECUTE, run.bytes, retries, name.encode(), given))
        try:
            return await asyncio.shield(job.ended)
        except asyncio.CancelledError as stop:
            self._channel.send(Message(protocol.STOP, run.bytes, meta=str(stop.args[0] if stop.args else "").encode()))
            ended, _ = await asyncio.wait({job.ended}, timeout=STOP_WITHIN)
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            if not ended:
                return Attempt(None, self._retries(run, job))
            if isinstance(error := job.ended.exception(), ExecutorEnded):
                return Attempt(None, error.retries)
            return job.ended.result()._replace(result=None)
        finally:
            if self._jobs.pop(run, None) is not None and not (job.ended.done() and _is_gone(job.ended)):
                self._left[run] = job

    async def cache_key(self, name: str, run: UUID, given: bytes, *, retries: int) -> str | None:
        """Code of the user may compute it: raises `ExecutorEnded` as `execute` does."""
        assert self._channel is not None
        key = asyncio.get_running_loop().create_future()
        self._keys[run] = key, retries
        self._gets(run)
        self._channel.send(Message(protocol.KEY, run.bytes, meta=name.encode(), body=given))
        try:
            return await key
        finally:
            self._keys.pop(run, None)

    # -- messages -----------------------------------------------------------------------------------------------------

    def _received(self, message: Message) -> None:
        match message.kind:
            case protocol.RESULT:
                self._attempted(UUID(bytes=message.id), message)
            case protocol.REPORTS if (run := UUID(bytes=message.id)) in self._jobs:
                self._reported(run, protocol.reported(message))
            case protocol.FREE:
                run = UUID(bytes=message.id)
                for jobs in (self._jobs, self._left):
                    if run in jobs and jobs[run].ended.done():
                        del jobs[run]
                        self._changed()
            case protocol.PONG:
                self._watch.answered = message.number
                self.figures, counted, self.worn = json.loads(message.body)
                for why, count in counted.items():
                    if (more := count - self._counted.get(why, 0.0)) > 0:
                        self._dropped(why, more)
                self._counted = counted
            case protocol.KEY:
                if (asked := self._keys.get(UUID(bytes=message.id))) is not None and not asked[0].done():
                    asked[0].set_result(message.body.decode() if message.number == protocol.FOUND else None)
            case protocol.READY:
                self.served = protocol.served(message)
                self._changed()
            case protocol.REFUSED:
                self._refusal = message.body.decode()
            case protocol.GET | protocol.PUT:
                request = asyncio.create_task(self._answer(message))
                self._requests.add(request)
                request.add_done_callback(self._requests.discard)
            case _:
                pass

    def _attempted(self, run: UUID, message: Message) -> None:
        job = self._jobs.get(run) or self._left.get(run)
        if job is None or job.ended.done():
            return
        if message.number == protocol.DISTURBED:
            fault: Fault = "own" if self._has_one else "unknown"
            job.ended.set_exception(ExecutorEnded(_DISTURBED, fault, self._retries(run, job)))
            job.ended.exception()
        else:
            job.ended.set_result(protocol.attempt(message))
        if run in self._left and _is_gone(job.ended):  # nobody has waited for it any more
            del self._left[run]
            self._changed()

    async def _answer(self, asked: Message) -> None:
        """An executor may read and write cached values, and nothing else of the store."""
        number, body, key = protocol.FOUND, b"", asked.meta.decode()
        answer: Awaitable[bytes | None]
        try:
            if not key.startswith("cache/") or ".." in key:
                raise Missing(key)
            answer = self._store.get(key) if asked.kind == protocol.GET else self._store.put(key, asked.body)
            body = await answer or b""
        except Missing:
            number = protocol.MISSING
        except StoreUnavailable as error:
            number, body = protocol.UNAVAILABLE, error.detail.encode()
        except Exception:
            log.exception("an executor's request to the store has failed")
            number, body = protocol.UNAVAILABLE, b"The worker could not reach the store: see its log."
        if self._channel is not None:
            self._channel.send(Message(protocol.ANSWER, asked.id, number, body=body))


_DISTURBED = Problem(
    code="executor_disturbed",
    title="The run's own asyncio task was cancelled",
    detail="Nobody has asked for it: code of a task has cancelled what it found on the event loop, or has raised where"
    " its exception was read.",
)


def _shared(name: str, size: int) -> IO[bytes]:
    """A file of this size that an executor can write. On Linux it is in memory, as a disk may be full, and its size is
    fixed: a process ends that reads in a mapping where its file has been cut off."""
    if sys.platform != "linux":
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # the caller closes it
        file.truncate(size)
        return file
    file = os.fdopen(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", buffering=0)
    file.truncate(size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file


def _is_gone(ended: asyncio.Future[Attempt]) -> bool:
    """Whether no code of the run goes on, once it is reported how its attempt has ended."""
    return ended.exception() is not None or not ended.result().is_left


def _how(code: int) -> str:
    if code >= 0:
        return f"with code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
