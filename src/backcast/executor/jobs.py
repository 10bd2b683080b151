"""Makes the attempts that the supervisor asks for, and reports how each ended."""

import asyncio
import contextlib
import contextvars
import json
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from backcast import llm, protocol
from backcast.errors import FatalError, UsageError
from backcast.executor.executor import Executor
from backcast.executor.habits import Habits
from backcast.executor.objects import CacheAway
from backcast.executor.reports import RunReports
from backcast.executor.tracking import RUN
from backcast.models import JSON, AttemptResult, Failed, Problem, Retry, Succeeded, Tried
from backcast.process import logs, tracing
from backcast.process.channel import Channel, Message
from backcast.process.marks import Marks
from backcast.protocol import Asked, Attempt
from backcast.reporting import REPORTER

log = logging.getLogger("backcast.executor")

ANSWERS = 100
"""Answers of the model, and failed casts, that metrics get of one attempt: the latest."""
TRIED = 10
"""Failures that are reported of those that were followed by a retry at once: the latest."""


class Jobs:
    def __init__(self, channel: Channel, executor: Executor, marks: Marks, *, max_result: int) -> None:
        self._channel, self._executor, self._marks, self._max_result = channel, executor, marks, max_result
        self._tasks = dict[bytes, asyncio.Task[None]]()
        self._retries = dict[bytes, int]()
        self._tried = dict[bytes, deque[Tried]]()
        self._asked = set[bytes]()
        self._traces = dict[bytes, str]()
        self._habits = Habits()

    def execute(self, message: Message) -> None:
        self._retries[message.id] = message.number
        self._tasks[message.id] = task = self._start(self._attempt(message), message.id)
        task.add_done_callback(lambda task: self._ended(message.id, task))

    @property
    def worn(self) -> str:
        """Why this process has to be replaced, or ""."""
        return self._habits.worn

    def _ended(self, run: bytes, task: "asyncio.Task[None]") -> None:
        if _is_torn(task):
            self._channel.send(Message(protocol.RESULT, run, protocol.DISTURBED))
        del self._tasks[run], self._retries[run]
        self._tried.pop(run, None)
        self._asked.discard(run)
        self._marks.ended(run)
        self._habits.ended(self._tasks.keys())

    def stop(self, message: Message) -> None:
        if (task := self._tasks.get(message.id)) is not None:
            self._asked.add(message.id)
            try:
                task.cancel(message.meta.decode())
            except BaseException as error:  # noqa: BLE001  # of a future of the user's; the supervisor waits no longer
                log.error("a run can't be stopped: what it awaits has raised %s", type(error).__name__)

    def trace(self, message: Message) -> None:
        """The run that comes next is part of this trace."""
        self._traces[message.id] = message.meta.decode()

    def key(self, message: Message) -> None:
        """Answer with the cache key of a run."""
        missing = Message(protocol.KEY, message.id, protocol.MISSING)
        task = self._start(self._key(message), message.id)
        task.add_done_callback(lambda task: _is_torn(task) and self._channel.send(missing))

    def _start(self, work: Any, run: bytes) -> "asyncio.Task[None]":
        context = contextvars.copy_context()
        context.run(RUN.set, run)
        return asyncio.get_running_loop().create_task(work, context=context)

    async def _key(self, message: Message) -> None:
        key = None
        with contextlib.suppress(ValueError, RecursionError):  # the attempt reports it
            given = json.loads(message.body)
            key = self._executor.cache_key(message.meta.decode(), UUID(bytes=message.id), given)
        found, body = (protocol.MISSING, b"") if key is None else (protocol.FOUND, key.encode())
        self._channel.send(Message(protocol.KEY, message.id, found, body=body))

    async def _attempt(self, message: Message) -> None:
        run = UUID(bytes=message.id)
        logs.RUN.set((run, message.meta.decode()))
        reports = RunReports(message.id, self._channel, lambda: self._retries.get(message.id, 0))
        REPORTER.set(reports)
        used = llm.metered()
        if self._traces and (traceparent := self._traces.pop(message.id, None)) is not None:
            tracing.go_on(traceparent)
        result = await self._result(message, run, reports)
        reports.close()  # before the result: it is recorded in this order
        if result is None and message.id not in self._asked:
            self._channel.send(Message(protocol.RESULT, message.id, protocol.DISTURBED))
            return
        left = self._executor.leave(message.id)
        retries = result.retries if isinstance(result, Retry) else self._retries[message.id]
        tried = tuple(self._tried.get(message.id, ()))
        usage, asked = _used(used) if used else (None, None)
        self._channel.send(protocol.result(run, Attempt(result, retries, usage, left, tried, asked)))

    async def _result(self, message: Message, run: UUID, reports: RunReports) -> AttemptResult | None:
        """None: it was stopped."""

        began = time.monotonic()

        def retried(count: int, why: Failed) -> None:
            reports.retried()
            self._retries[message.id] = count
            self._marks.retried(message.id, count)
            tried = self._tried.setdefault(message.id, deque(maxlen=TRIED))
            since, until = tried[-1].until if tried else 0.0, time.monotonic() - began
            tried.append(Tried(why.problem, why.traceback, since, until))

        try:
            given: dict[str, JSON] = json.loads(message.body.decode())
        except (ValueError, RecursionError) as error:
            return _failed(UsageError(f"The stored input can't be read: {error}", code="unreadable_input"))
        try:
            result = await self._executor.execute(
                message.meta.decode(), run, given, retries=message.number, retried=retried
            )
        except asyncio.CancelledError:
            return None
        except CacheAway as error:
            return Retry.after_outage(error, self._retries[message.id])
        if isinstance(result, Succeeded) and len(result.body) > self._max_result:
            return _failed(
                FatalError(
                    f"The result has {len(result.body)} bytes of JSON, more than the {self._max_result} allowed: return"
                    " less, or store it yourself and return its address.",
                    code="result_too_large",
                )
            )
        return result


def _is_torn(task: "asyncio.Task[None]") -> bool:
    """Whether it has ended before its end: cancelled, or by an error that the code of a run has raised where it has no
    business, as in the text of its exception."""
    return task.cancelled() or task.exception() is not None


def _failed(error: UsageError | FatalError) -> Failed:
    return Failed(Problem.from_error(error))


def _used(used: Sequence[llm.Usage | llm.Failure]) -> tuple[dict[str, JSON] | None, Asked]:
    """The tokens of an attempt, however it ended, as they are paid for; and what metrics count of it."""
    answers = [one for one in used if isinstance(one, llm.Usage)]
    failures = tuple((one.model, one.code) for one in used[-ANSWERS:] if isinstance(one, llm.Failure))
    seconds = tuple(round(one.seconds, 4) for one in answers[-ANSWERS:])
    asked = Asked(seconds, sum(one.dollars for one in answers), failures)
    if not answers:
        return None, asked
    tokens = {kind: sum(getattr(one, kind) for one in answers) for kind in ("input_tokens", "output_tokens")}
    return {"model": answers[-1].model, **tokens}, asked
