"""Tasks of a user for the tests. Their side effects go to the folder that the worker was started in."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from prefect import get_run_logger, runtime, task
from prefect.cache_policies import INPUTS, TASK_SOURCE
from pydantic import BaseModel, TypeAdapter

from backcast import delay, emit, progress
from backcast.errors import FatalError, TransientError, UsageError
from tests.support.waiting import until


class Order(BaseModel):
    item: str
    quantity: int
    due: date


def _note(name: str) -> int:
    """Count the calls of a name, across processes."""
    with Path(f"calls-{name}").open("a") as file:
        file.write(".")
    return Path(f"calls-{name}").stat().st_size


@task
async def echo(value: Any) -> Any:
    return value


@task
async def who() -> int:
    """The process that executes it."""
    return os.getpid()


@task
def delegate(value: Any) -> Any:
    """Makes a run of another task, and waits for it."""
    return delay(echo, value).result(timeout=60)


T = TypeVar("T")


@task
def stream(length: int) -> Iterator[int]:
    """A generator: it can't be run here."""
    yield from range(length)


@task
def over_a_lock(lock: threading.Thread) -> None:
    """No JSON can fill its parameter."""


@task(tags=["gpu"])
def tagged(lock: threading.Thread | None = None) -> bool:
    return lock is None


@task
async def shaped(data: Any, target: type[T], instructions: str | None = None) -> T:
    """The signature of Prefect's example."""
    return TypeAdapter(target).validate_python(data)


@task
async def child(value: int) -> int:
    return value


@task
async def parent() -> int:
    """Calls another task, whose run only Prefect knows."""
    return await child(1)


@task
def delayed(order: Order, on: date) -> int:
    return _note(f"{order.item}-{on.year}")


@task
async def delaying(order: Order) -> str:
    """Leaves a run of another task to whoever serves that one with plain Prefect."""
    return str(delayed.delay(order, on=date(2031, 1, 2)).task_run_id)


@task
def delaying_in_a_thread(order: Order) -> str:
    return str(delayed.delay(order, on=date(2032, 1, 2)).task_run_id)


@task
def calling(method: str) -> Any:
    """Calls a method of another task."""
    return getattr(child, method)([1])


@task
async def nap(seconds: float, name: str = "nap") -> float:
    _note(name)
    await asyncio.sleep(seconds)
    return seconds


async def _there(name: str) -> None:
    async def look() -> bool:
        return Path(name).exists()

    await until(look, timeout=3600)


@task
async def linger(name: str) -> str:
    """Runs until the test releases this name."""
    _note(name)
    await _there(f"release-{name}")
    return name


@task
def linger_in_a_thread(name: str) -> str:
    asyncio.run(_there(f"release-{name}"))
    return name


@task
def block(seconds: float) -> float:
    """Sleeps in a thread."""
    time.sleep(seconds)
    return seconds


@task
async def block_the_loop(seconds: float) -> float:
    """A mistake of a user: an async task that blocks."""
    time.sleep(seconds)
    return seconds


@task
async def reorder(order: Order, on: date) -> Order:
    """Change the date of an order.

    Args:
        order: what was ordered
        on: the new date
    """
    assert isinstance(order, Order)
    assert isinstance(on, date)
    return order.model_copy(update={"due": on})


@task(retries=3, retry_delay_seconds=0.2)
async def flaky(name: str, fails: int) -> int:
    calls = _note(name)
    if calls <= fails:
        raise TransientError(f"call {calls} of {name}")
    return calls


@task(retries=3, retry_delay_seconds=0)
def flaky_at_once(name: str, fails: int) -> int:
    calls = _note(name)
    if calls <= fails:
        raise ValueError(f"call {calls} of {name}")
    return calls


@task(retries=3, retry_delay_seconds=0.1)
async def fail(kind: str, name: str = "fail") -> None:
    _note(name)
    raise {"usage": UsageError, "fatal": FatalError, "plain": ValueError}[kind]("as asked \x00 \ud800")


@task(timeout_seconds=0.3)
async def too_slow() -> None:
    await asyncio.sleep(30)


@task
async def unserialisable(kind: str) -> Any:
    return {"bytes": b"\xff\x00", "object": object(), "nan": [float("nan")], "surrogate": "\ud800", "set": {1}}[kind]


@task(cache_policy=INPUTS + TASK_SOURCE)
async def counted(name: str, payload: Any) -> int:
    return _note(name)


@task(cache_key_fn=lambda _, given: given["text"])
async def keyed(text: str) -> int:
    return _note("keyed") and len(text)


@task(log_prints=True)
async def talk(words: str) -> str:
    get_run_logger().info("logged: %s", words)
    print(f"printed: {words}")
    return words


@task
async def kill_worker(name: str, times: int) -> int:
    calls = _note(name)
    if calls <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return calls


@task(cache_policy=INPUTS + TASK_SOURCE)
async def counted_slowly(name: str) -> int:
    """Runs until the test releases this name."""
    calls = _note(name)
    await _there(f"release-{name}")
    return calls


@task(cache_policy=INPUTS + TASK_SOURCE)
async def stuck_once(name: str) -> int:
    calls = _note(name)
    if calls == 1:
        await asyncio.sleep(3600)
    return calls


@contextlib.contextmanager
def _among(name: str) -> Iterator[int]:
    """How many of this name are here, itself included."""
    now = Path(f"now-{name}")
    now.mkdir(exist_ok=True)
    mine = now / secrets.token_hex(8)
    mine.touch()
    try:
        yield len(list(now.iterdir()))
    finally:
        mine.unlink(missing_ok=True)


@task
async def crowded(name: str, seconds: float) -> int:
    """How many of this name ran when this one began, itself included. The first ones run until two have met."""
    with _among(name) as present:
        if present > 1:
            Path(f"met-{name}").touch()
        await _there(f"met-{name}")
        await asyncio.sleep(seconds)
    return present


@task
async def linger_among(name: str) -> int:
    """How many of this name ran when this one began. Runs until the test releases the name."""
    with _among(name) as present:
        await _there(f"release-{name}")
        await asyncio.sleep(0.05)
    return present


@task
def shout(size: int) -> int:
    """Writes one line, which has no end."""
    return os.write(2, b"x" * size)


@task
def leave_a_process() -> int:
    """Starts a process that goes on, outside of the worker's group, with the worker's output as its own."""
    return subprocess.Popen(["sleep", "3600"], start_new_session=True).pid


ODD = {"surrogate": "\ud800", "nul": "a\x00b", "long": "x" * 500_000, "plain": "plain"}


@task(task_run_name=lambda: ODD[runtime.task_run.parameters["kind"]], log_prints=True)
async def oddly(kind: str) -> str:
    """Has a name and prints a line that Prefect's server can't take."""
    print(ODD[kind])
    return await oddly_child(kind)


@task(task_run_name=lambda: ODD[runtime.task_run.parameters["kind"]])
async def oddly_child(kind: str) -> str:
    return kind


@task
async def report(steps: int, way: str = "loop") -> int:
    """Reports each of its steps: from the loop, or from threads."""

    def step(n: int) -> None:
        progress(n / steps, f"step {n} of {steps}")
        emit({"step": n}, kind="step")

    for n in range(1, steps + 1):
        await asyncio.to_thread(step, n) if way == "thread" else step(n)
    return steps


@task
def report_in_thread(steps: int) -> int:
    for n in range(1, steps + 1):
        progress(n / steps)
        emit({"step": n})
    return steps


@task(retries=3, retry_delay_seconds=0.2)
async def report_and_fail(name: str, fails: int) -> int:
    calls = _note(name)
    emit(calls)
    if calls <= fails:
        raise TransientError(f"call {calls} of {name}")
    return calls


@task(retries=3, retry_delay_seconds=0)
def report_and_fail_at_once(name: str, fails: int) -> int:
    calls = _note(name)
    emit(calls)
    if calls <= fails:
        raise ValueError(f"call {calls} of {name}")
    return calls


@task
async def report_and_linger(name: str) -> str:
    """Reports, and does so again once it is released."""
    progress(0.4, "page 12 of 30")
    emit("first")
    await _there(f"release-{name}")
    emit("last")
    progress(1)
    return name


@task
async def deep(message: str, depth: int) -> None:
    """Fails in the depth of its calls, which no two lines of the traceback repeat."""
    calls, name = dict[str, Any](), f"level_{'x' * 60}_"
    for n in range(depth):
        exec(f"async def {name}{n}(message):\n    await levels['{name}{n + 1}'](message)", {"levels": calls}, calls)

    async def raises(message: str) -> None:
        raise ValueError(message)

    calls[f"{name}{depth}"] = raises
    await calls[f"{name}0"](message)


def _chatter(name: str, fails: int) -> int:
    calls = _note(name)
    log = logging.getLogger("tests.app")
    log.debug("too fine")
    log.info("call %d of %s", calls, name)
    get_run_logger().info("by Prefect")
    print("printed,", end=" ")
    print("in parts")
    print("to stderr", file=sys.stderr)
    print("the token is", os.environ.get("APP_TOKEN"))
    logging.getLogger("httpx").info("a request")
    try:
        raise LookupError("caught")
    except LookupError:
        log.exception("an error")
    print("without an end", end="")
    if calls <= fails:
        raise TransientError(f"call {calls} of {name}")
    return calls


@task(retries=3, retry_delay_seconds=0.2)
async def chatter(name: str, fails: int = 0) -> int:
    return _chatter(name, fails)


@task(retries=3, retry_delay_seconds=0)
def chatter_in_a_thread(name: str, fails: int = 0) -> int:
    return _chatter(name, fails)


@task(log_prints=True)
async def print_a_lot(lines: int, linger: str | None = None) -> None:
    for n in range(lines):
        print(f"line {n}")
    if linger:
        await _there(f"release-{linger}")


@task(retries=3, retry_delay_seconds=0.2)
async def report_and_log(name: str, fails: int) -> None:
    calls = _note(name)
    for step in range(3):
        print(f"step {step} of call {calls}")
        emit(step)
    if calls <= fails:
        raise TransientError(f"call {calls} of {name}")


@task
async def log_when_released(name: str, lines: int) -> None:
    """Logs a line for each number once the test releases it."""
    for number in range(lines):
        await _there(f"release-{name}-{number}")
        print(f"line {number}")


@task
async def log_and_die(name: str) -> None:
    """Ends its process once what it has logged is on its way."""
    print("the last words")
    await _there(f"release-{name}")
    os._exit(3)
