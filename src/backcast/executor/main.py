"""The executor process: runs the tasks for one supervisor, and ends with it.

It is started as a fresh process with three descriptors: a socket to the supervisor, a page for its marks, and a file
for the dump of its threads. All that it has to know comes over the socket.
"""

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn
from uuid import UUID

import uvloop
from pydantic import SecretStr

from backcast import protocol
from backcast.errors import ConfigurationError
from backcast.executor.tracking import end_copy, guard, task_factory
from backcast.process import orphans, tracing
from backcast.process.channel import Channel, Message, packed, receive
from backcast.process.logs import configure_logging
from backcast.process.marks import Marks
from backcast.protocol import Assignment, Served

if TYPE_CHECKING:
    from backcast.executor.jobs import Jobs
    from backcast.executor.objects import RemoteObjects
    from backcast.history.sink import Sink

log = logging.getLogger("backcast.executor")

_DIE_WITH_PARENT = 1


class _Process:
    """Takes the supervisor's messages, from the first import on."""

    def __init__(self, assignment: Assignment, marks: Marks) -> None:
        self._assignment, self._marks = assignment, marks
        self._closing = asyncio.Event()
        self._identity = asyncio.get_running_loop().create_future()
        self._jobs: Jobs | None = None
        self._objects: RemoteObjects | None = None
        self._sink: Sink | None = None

    async def serve(self, end: socket.socket) -> None:
        # Imported late: Prefect reads its settings when it is imported, and ours must be there first.
        from backcast import llm
        from backcast.executor import capture, logs, redaction, registry
        from backcast.executor.executor import Executor
        from backcast.executor.jobs import Jobs
        from backcast.executor.objects import RemoteObjects
        from backcast.history.sink import Sink
        from backcast.process import background

        given = self._assignment
        channel = self._channel = await Channel.over(end, self._received)
        self._sink = sink = Sink(given.prefect)
        capture.install(sink)
        redaction.know(
            value.get_secret_value()
            for section in (given.model, given.prefect)
            for _, value in section
            if isinstance(value, SecretStr)
        )
        logs.install()
        if given.tracing.endpoint is not None:
            from backcast.executor.spans import Redacting

            tracing.start(given.tracing, "executor", through=Redacting)
        llm.connect(given.model)
        self._objects = objects = RemoteObjects(channel, largest=protocol.largest(given.max_result))
        try:
            tasks = registry.discover(given.tasks)
        finally:
            end_copy()
        executor = Executor(
            tasks,
            pool=given.pool,
            max_attempts=given.max_attempts,
            store=objects,
            threads=given.slots,
            publish=sink.publish if sink.is_enabled else None,
            marks=self._marks,
            freed=lambda run: channel.send(Message(protocol.FREE, run)),
        )
        asyncio.get_running_loop().set_task_factory(task_factory(self._marks))
        async with executor:
            self._jobs = Jobs(channel, executor, self._marks, max_result=given.max_result)
            served = [
                Served(
                    type=each.type,
                    is_cached=each.is_cached,
                    is_isolated=each.options.isolation == "process",
                    may_block=each.options.may_block,
                )
                for each in executor.registered.values()
            ]
            gc.freeze()  # what has been imported is never garbage: walking it again and again took 5 % of the CPU time
            channel.send(protocol.ready(served))
            while not (channel.lost.is_set() or self._closing.is_set()):
                publishing = background.keep("publish history", lambda: sink.run(self._identify))
                own = [asyncio.create_task(work) for work in (publishing, channel.lost.wait(), self._closing.wait())]
                with contextlib.suppress(asyncio.CancelledError):  # user code has cancelled all that it found
                    await asyncio.wait(own[1:], return_when=asyncio.FIRST_COMPLETED)
                for task in own:
                    task.cancel()
                await asyncio.gather(*own, return_exceptions=True)
        await asyncio.to_thread(tracing.flush)
        await llm.aclose()
        await sink.aclose(timeout=2)

    async def _identify(self) -> UUID:
        return await asyncio.shield(self._identity)

    def _received(self, message: Message) -> None:
        match message.kind:
            case protocol.PING:
                worn = self._jobs.worn if self._jobs is not None else ""
                figures = [{}, {}, worn] if self._sink is None else [self._sink.figures, self._sink.dropped, worn]
                self._channel.send(Message(protocol.PONG, number=message.number, body=json.dumps(figures).encode()))
            case protocol.EXECUTE if self._jobs is not None:
                self._jobs.execute(message)
            case protocol.TRACE if self._jobs is not None:
                self._jobs.trace(message)
            case protocol.STOP if self._jobs is not None:
                self._jobs.stop(message)
            case protocol.KEY if self._jobs is not None:
                self._jobs.key(message)
            case protocol.ANSWER if self._objects is not None:
                self._objects.answered(message)
            case protocol.TAG if not self._identity.done():
                self._identity.set_result(UUID(bytes=message.id))
            case protocol.CLOSE:
                self._closing.set()
            case _:
                pass


def _run(end: socket.socket, assignment: Assignment, marks: Marks) -> None:
    """Serve to the end. `sys.exit()` in a callback or a task of a run leaves the loop, and `stop()` does: it goes on,
    as the other runs must. Only from `close()` it does not come back."""
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)

    async def serve() -> None:
        await _Process(assignment, marks).serve(end)

    serving = loop.create_task(serve())
    while not serving.done():
        end_copy()
        if loop.is_closed():
            log.error("user code has closed the event loop")
            logging.shutdown()
            os._exit(1)
        try:
            loop.run_until_complete(serving)
        except (SystemExit, KeyboardInterrupt) as error:
            if serving.done():
                raise
            log.warning("user code has raised %s in the event loop; it goes on", type(error).__name__)
        except RuntimeError:
            if serving.done():
                raise
            log.warning("user code has stopped the event loop; it goes on")
    serving.result()


def _ignore(*_: object) -> None:
    """A `KeyboardInterrupt` would end whatever the loop does just now. The children of tasks do not inherit this."""


def _exit(dump_fd: int, pid: int, plain: Callable[[int], NoReturn], code: int) -> NoReturn:
    """`os._exit`, which leaves a dump: the supervisor learns from it whose code has called it."""
    if os.getpid() == pid:
        faulthandler.dump_traceback(file=dump_fd)
    plain(code)


def main() -> None:
    """Run an executor; its arguments are its descriptors."""
    channel_fd, marks_fd, dump_fd = map(int, sys.argv[1:4])
    supervisor = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    guard(channel_fd)
    orphans.adopt()  # they go to the supervisor when this ends, which ends them
    faulthandler.enable(file=dump_fd)
    os._exit = partial(_exit, dump_fd, os.getpid(), os._exit)  # type: ignore[assignment]
    signal.signal(signal.SIGINT, _ignore)
    end = socket.socket(fileno=channel_fd)
    os.set_inheritable(channel_fd, False)
    try:
        [given] = receive(end)
    except (EOFError, OSError):
        return  # the supervisor is gone already
    if os.getppid() != supervisor:
        return
    assignment = Assignment.model_validate_json(given.body)
    configure_logging(assignment.log_level, assignment.log_format, worker=assignment.worker)
    os.environ.update(assignment.prefect.environment())
    try:
        _run(end, assignment, Marks(marks_fd, assignment.slots))
    except ConfigurationError as error:
        end.setblocking(True)
        with contextlib.suppress(OSError):
            end.sendall(packed([Message(protocol.REFUSED, body=error.detail.encode())]))
        logging.shutdown()
        os._exit(2)
    # Everything is reported. A sync task that ignores its release must not keep the process.
    if threading.active_count() > 1:
        logging.shutdown()
        os._exit(0)


if __name__ == "__main__":
    main()
