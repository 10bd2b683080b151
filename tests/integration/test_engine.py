"""One attempt of a run, on both ways: on Prefect's engine (`prefect`) and by calling the function (`plain`). Assertions
that do not look at the way hold for both. No server runs."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect import get_run_logger, runtime, task
from prefect.cache_policies import INPUTS, TASK_SOURCE
from prefect.context import TaskRunContext
from prefect.events.worker import EventsWorker
from prefect.states import Cancelled, Completed, Running
from prefect.states import Failed as FailedState

from backcast import cancel_requested, options
from backcast.errors import FatalError, StoreUnavailable, TransientError, UsageError
from backcast.executor import capture
from backcast.executor.executor import Executor
from backcast.executor.objects import CacheAway
from backcast.executor.threads import APART
from backcast.executor.tracking import RUN
from backcast.history.events import Change
from backcast.history.sink import Sink
from backcast.models import AttemptResult, Failed, Retry, Succeeded
from backcast.settings import Prefect
from backcast.settings import Store as StoreSettings
from backcast.store import Store, open_store
from tests.support import sample_tasks
from tests.support.stack import ROOT
from tests.support.waiting import until

calls: Counter[str] = Counter()
gates: dict[str, threading.Event] = {}
seen: dict[str, Any] = {}


@task
async def a_value(value: Any) -> Any:
    return value


@task
def s_value(value: Any) -> Any:
    return value


@task
def every_kind(first: int, /, second: int = 2, *rest: int, third: int = 3, **more: int) -> list[Any]:
    return [first, second, rest, third, more]


class Mute(ValueError):
    """Its message can't be read."""

    def __str__(self) -> str:
        raise RuntimeError("in __str__")

    __repr__ = __str__


KINDS: dict[str, Any] = {
    "mute": Mute,
    "plain": lambda: ValueError("as asked"),
    "usage": lambda: UsageError("as asked"),
    "fatal": lambda: FatalError("as asked"),
    "transient": lambda: TransientError("as asked"),
    "wait": lambda: TransientError("as asked", retry_after=timedelta(seconds=77)),
    "timeout": lambda: TimeoutError("of its own"),
    "odd": lambda: TransientError("as asked", code=cast("str", 503)),
    "away": lambda: StoreUnavailable("as asked"),
    "exit": lambda: SystemExit(1),
    "cancelled": lambda: asyncio.CancelledError(),
}


@task(retries=2, retry_delay_seconds=5)
async def a_fails(kind: str) -> None:
    error = KINDS[kind]()
    raise error


@task(retries=2, retry_delay_seconds=5)
def s_fails(kind: str) -> None:
    error = KINDS[kind]()
    raise error


@task(retries=3, retry_delay_seconds=[1, 20])
async def a_list() -> None:
    raise ValueError("again")


@task(retries=3, retry_delay_seconds=[1, 20])
def s_list() -> None:
    raise ValueError("again")


@task(retries=3, retry_delay_seconds=lambda retries: [10.0 * (n + 1) for n in range(retries)], retry_jitter_factor=0.5)
async def a_jitter() -> None:
    raise ValueError("again")


@task(retries=3, retry_delay_seconds=lambda retries: [10.0 * (n + 1) for n in range(retries)], retry_jitter_factor=0.5)
def s_jitter() -> None:
    raise ValueError("again")


@task(retries=3)
async def a_at_once(name: str, fails: int) -> int:
    calls[name] += 1
    if calls[name] <= fails:
        raise ValueError(f"call {calls[name]}")
    return runtime.task_run.run_count


@task(retries=3)
def s_at_once(name: str, fails: int) -> int:
    calls[name] += 1
    if calls[name] <= fails:
        raise ValueError(f"call {calls[name]}")
    return runtime.task_run.run_count


def only_twice(task: Any, run: Any, state: Any) -> bool:
    assert isinstance(state.data, ValueError)
    assert task.name.endswith("choosy")
    return run.run_count < 2


@task(retries=5, retry_condition_fn=only_twice)
async def a_choosy() -> None:
    raise ValueError("again")


@task(retries=5, retry_condition_fn=only_twice)
def s_choosy() -> None:
    raise ValueError("again")


def broken(task: Any, run: Any, state: Any) -> bool:
    raise RuntimeError("in the condition")


@task(retries=5, retry_condition_fn=broken)
async def a_undecided() -> None:
    raise ValueError("again")


@task(retries=5, retry_condition_fn=broken)
def s_undecided() -> None:
    raise ValueError("again")


def waits(task: Any, run: Any, state: Any) -> bool:
    seen["condition"] = run.id
    return not gates["condition"].wait(3600)


@task(retries=1, retry_condition_fn=waits)
def s_hesitant() -> None:
    raise ValueError("again")


STATES: dict[str, Any] = {
    "completed": lambda: Completed(data=[1]),
    "failed": lambda: FailedState(message="as returned"),
    "cancelled": lambda: Cancelled(message="as returned"),
    "running": lambda: Running(),
}


@task
async def a_state(name: str) -> Any:
    return STATES[name]()


@task
def s_state(name: str) -> Any:
    return STATES[name]()


@task(timeout_seconds=0.2, retries=1, retry_delay_seconds=9)
async def a_slow() -> None:
    await asyncio.sleep(3600)


@task(timeout_seconds=0.2, retries=1, retry_delay_seconds=9)
def s_slow() -> None:
    while True:
        threading.Event().wait(0.01)


@task(timeout_seconds=5, retries=1)
def s_stuck(name: str) -> str:
    """A single call that blocks: nothing can be raised in its thread."""
    calls[name] += 1
    if calls[name] == 1:
        gates[name].wait(3600)
        seen[name] = cancel_requested()
    return f"call {calls[name]}"


@task(timeout_seconds=0.2)
async def a_swallows(name: str) -> None:
    while not gates[name].is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)


@task(timeout_seconds=0.2)
async def a_apart(name: str) -> None:
    await asyncio.to_thread(gates[name].wait, 3600)


@task(log_prints=True)
async def a_asks() -> list[Any]:
    get_run_logger().info("logged")
    print("printed")
    context = TaskRunContext.get()
    assert context
    return [runtime.task_run.id, runtime.task_run.name, context.parameters, await a_child(1)]


@task(log_prints=True)
def s_asks() -> list[Any]:
    get_run_logger().info("logged")
    print("printed")
    context = TaskRunContext.get()
    assert context
    return [runtime.task_run.id, runtime.task_run.name, context.parameters, s_child(1)]


@task(persist_result=False)
async def a_child(x: int) -> int:
    return x + 1


@task(persist_result=False)
def s_child(x: int) -> int:
    return x + 1


@task
async def a_waits(name: str) -> None:
    gates[name].set()
    await asyncio.sleep(3600)


@task
def s_waits(name: str) -> str:
    calls[name] += 1
    gates[name].wait(3600)
    seen[name] = cancel_requested()
    return "too late"


@task(cache_policy=INPUTS + TASK_SOURCE)
async def a_cached(name: str, more: Any = None) -> int:
    calls[name] += 1
    return calls[name]


@task(cache_policy=INPUTS + TASK_SOURCE)
def s_cached(name: str, more: Any = None) -> int:
    calls[name] += 1
    return calls[name]


@task(cache_policy=INPUTS, refresh_cache=True)
async def a_fresh(name: str) -> None: ...


def note_hook(task: Any, run: Any, state: Any) -> None:
    seen.setdefault("hooks", []).append((task.name, run.id, state.name))


@task(on_running=[note_hook], on_completion=[note_hook], on_failure=[note_hook], task_run_name="hooked {fail}")
async def a_hooked(fail: bool) -> None:
    assert not fail


@task(on_running=[note_hook], on_completion=[note_hook], on_failure=[note_hook], task_run_name="hooked {fail}")
def s_hooked(fail: bool) -> None:
    assert not fail


@options(history="none", lane="quota")
@task
async def a_quiet() -> None: ...


@options(history="none")
@task(cache_policy=INPUTS)
async def a_quiet_cached(name: str) -> int:
    calls[name] += 1
    return calls[name]


@task
async def a_breaks() -> None:
    raise ValueError("as asked")


@task
def s_breaks() -> None:
    raise ValueError("as asked")


YEAR = 365 * 24 * 3600
ODD: list[tuple[dict[str, Any], float]] = [
    ({"retry_delay_seconds": 1e12}, YEAR),
    ({"retry_delay_seconds": 1e14}, YEAR),
    ({"retry_delay_seconds": [1e300]}, YEAR),
    ({"retry_delay_seconds": 10**400}, YEAR),
    ({"retry_delay_seconds": float("inf")}, YEAR),
    ({"retry_delay_seconds": [float("nan"), 1]}, 0),
    ({"retry_delay_seconds": -1e12}, 0),
    ({"retry_delay_seconds": 5, "retry_jitter_factor": float("nan")}, 5),
    ({"retry_delay_seconds": 5, "timeout_seconds": 1e14}, 5),
    ({"retry_delay_seconds": 5, "timeout_seconds": float("inf")}, 5),
    ({"retry_delay_seconds": 5, "timeout_seconds": float("nan")}, 5),
]
"""Numbers of a task that no clock can keep, and the delay that follows."""
TASKS = {one.name: one for one in list(vars().values()) if isinstance(one, type(a_value))}
TASKS |= {
    f"{one.name}_{n}": one.with_options(name=f"{one.name}_{n}", retries=2**40, **odd)
    for one in (a_breaks, s_breaks)
    for n, (odd, _) in enumerate(ODD)
}


class Way:
    """An executor, and the changes that it published."""

    executor: Executor

    def __init__(self) -> None:
        self.published: list[Change] = []

    async def run(self, task: str, retries: int = 0, *, run_id: UUID | None = None, **given: Any) -> AttemptResult:
        return await self.executor.execute(task, run_id or uuid4(), given, retries=retries)

    def states(self, run_id: UUID) -> list[str]:
        return [change.name for change in self.published if change.run == run_id]


@pytest.fixture(params=["prefect", "plain"])
async def way(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Way]:
    sink = Sink(Prefect(api_url="http://127.0.0.1:9/api", history=False))
    capture.install(sink)
    store = open_store(StoreSettings(url=f"file://{tmp_path}/store"))
    await store.ensure()
    way = Way()
    publish = way.published.append if request.param == "prefect" else None
    async with Executor(TASKS, pool="p", max_attempts=3, store=store, threads=3, publish=publish) as way.executor:
        yield way
        for gate in gates.values():
            gate.set()
        await until(busy(way), lambda n: n == 0)
    EventsWorker.set_client_override(None)
    await sink.aclose(0)
    await store.aclose()


@pytest.fixture
async def on_prefect(way: Way, request: pytest.FixtureRequest) -> Way:
    if request.node.callspec.params["way"] == "plain":
        pytest.skip("the plain way publishes nothing")
    return way


def busy(way: Way) -> Any:
    async def look() -> int:
        return len(way.executor._threads._calls)

    return look


@pytest.fixture(params=["a", "s"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_an_exception_that_can_not_be_shown_keeps_its_retries(way: Way, kind: str) -> None:
    first, last = [await way.run(f"{kind}_fails", kind="mute", retries=retries) for retries in (0, 2)]
    assert isinstance(first, Retry)
    assert isinstance(last, Failed)
    assert first.problem.detail == last.problem.detail == "Mute: (its message can't be read: RuntimeError)"


async def test_a_value_is_by_name_json(way: Way, kind: str) -> None:
    assert await way.run(f"{kind}_value", value={"a": [1, None]}) == Succeeded(b'{"a":[1,null]}')
    failed = await way.run(f"{kind}_value", value=object())
    assert isinstance(failed, Failed)
    assert failed.problem.code == "unserialisable_result"
    failed = await way.run(f"{kind}_value", unknown=1)
    assert isinstance(failed, Failed)
    assert failed.problem.code == "invalid_input"


async def test_parameters_of_every_kind(way: Way) -> None:
    assert await way.run("every_kind", first=1, second=2, rest=[5, 6], third=9, more={"x": 1}) == Succeeded(
        b'[1,2,[5,6],9,{"x":1}]'
    )


@pytest.mark.parametrize(
    ("error", "result", "code"),
    [
        ("plain", Retry, "task_failed"),
        ("usage", Failed, "unusable_input"),
        ("fatal", Failed, "task_failed"),
        ("transient", Retry, "temporarily_failed"),
        ("timeout", Retry, "task_failed"),
        ("away", Retry, "task_failed"),
        ("odd", Retry, "503"),
        ("exit", Failed, "task_failed"),
        ("cancelled", Failed, "task_failed"),
    ],
)
async def test_error_kinds_decide(way: Way, kind: str, error: str, result: type[Any], code: str) -> None:
    ended = await way.run(f"{kind}_fails", kind=error)
    assert isinstance(ended, result)
    assert ended.problem.code == code
    last = await way.run(f"{kind}_fails", 2, kind=error)
    assert isinstance(last, Failed), "its retries are used up"
    assert last.problem == ended.problem


async def test_delays_are_the_tasks(way: Way, kind: str) -> None:
    for before, delay in ((0, 1), (1, 20), (2, 20)):
        ended = await way.run(f"{kind}_list", before)
        assert isinstance(ended, Retry)
        assert ended.retries == before + 1
        assert ended.delay == pytest.approx(delay, abs=0.9)
    ended = await way.run(f"{kind}_jitter", 1)
    assert isinstance(ended, Retry)
    assert 0 <= ended.delay <= 30
    ended = await way.run(f"{kind}_fails", kind="wait")
    assert isinstance(ended, Retry)
    assert ended.delay == 77, "the delay of a refusal beats the backoff"


async def test_a_number_that_no_clock_can_keep_is_bounded(way: Way, kind: str) -> None:
    for n, (_, delay) in enumerate(ODD):
        way.executor.registered[f"{kind}_breaks_{n}"].task.retries = 2
        ended = await way.run(f"{kind}_breaks_{n}", 0)
        if delay:
            assert isinstance(ended, Retry)
            assert ended.delay == pytest.approx(delay, abs=4)
        assert not isinstance(ended, Succeeded)
        assert ended.problem.detail == "ValueError: as asked", "the task's own error is not masked"


async def test_without_a_delay_the_next_attempt_is_made_at_once(way: Way, kind: str) -> None:
    name = str(uuid4())
    assert await way.run(f"{kind}_at_once", name=name, fails=2) == Succeeded(b"3")
    assert calls[name] == 3
    ended = await way.run(f"{kind}_at_once", 1, name=str(uuid4()), fails=99)
    assert isinstance(ended, Failed)
    assert ended.problem.detail == "ValueError: call 3", "one of three retries was used before"


async def test_the_tasks_own_condition_is_asked(way: Way, kind: str) -> None:
    for name in ("choosy", "undecided"):
        ended = await way.run(f"{kind}_{name}")
        assert isinstance(ended, Failed)
        assert ended.problem.detail == "ValueError: again"


async def test_a_task_may_return_a_state(way: Way, kind: str) -> None:
    assert await way.run(f"{kind}_state", name="completed") == Succeeded(b"[1]")
    for name in ("failed", "cancelled"):
        ended = await way.run(f"{kind}_state", name=name)
        assert isinstance(ended, Failed)
        assert ended.problem.detail == "as returned"
    ended = await way.run(f"{kind}_state", name="running")
    assert isinstance(ended, Failed)
    assert "a final state" in ended.problem.detail


async def test_a_task_that_takes_too_long_is_interrupted(way: Way, kind: str) -> None:
    ended = await way.run(f"{kind}_slow")
    assert isinstance(ended, Retry)
    assert ended.problem.code == "timeout"
    assert ended.delay == pytest.approx(9, abs=0.9)
    last = await way.run(f"{kind}_slow", 1)
    assert isinstance(last, Failed)
    assert last.problem.detail == "Task run exceeded timeout of 0.2 second(s)"
    await until(busy(way), lambda n: n == 0)


async def test_a_thread_that_can_not_be_interrupted_is_left_behind(way: Way) -> None:
    name, run_id = str(uuid4()), uuid4()
    gates[name] = threading.Event()
    first = await way.run("s_stuck", run_id=run_id, name=name)
    assert isinstance(first, Retry), "not at once: its thread still has the slot"
    assert await way.run("s_stuck", first.retries, run_id=run_id, name=name) == Succeeded(b'"call 2"')
    assert await busy(way)() == 1
    gates[name].set()
    await until(busy(way), lambda n: n == 0)
    if way.published:
        assert way.states(run_id) == ["Running", "Retrying", "Running", "Completed"]


async def test_a_coroutine_that_does_not_end_is_left_behind(way: Way) -> None:
    name, run_id = str(uuid4()), uuid4()
    gates[name] = threading.Event()
    late = await way.run("a_swallows", run_id=run_id, name=name)
    assert isinstance(late, Failed)
    assert late.problem.code == "timeout"
    assert await busy(way)() == 1, "it goes on, and still has the slot"
    gates[name].set()
    await until(busy(way), lambda n: n == 0)
    assert way.states(run_id) == (["Running", "TimedOut"] if way.published else [])


async def test_a_thread_is_not_left_because_others_cancel_what_they_find(way: Way) -> None:
    name = str(uuid4())
    gates[name] = threading.Event()
    execution = asyncio.create_task(way.run("s_waits", name=name))
    await until(busy(way), lambda n: n == 1)
    for _ in range(3):
        execution.cancel()
        await asyncio.sleep(0)
    gates[name].set()
    assert await execution == Succeeded(b'"too late"')


async def test_threads_that_tasks_take_for_themselves_keep_nobody_waiting(way: Way) -> None:
    """More of them than the loop has by default; a sync task beside them is late, and its time-out is recorded."""
    name, run = str(uuid4()), RUN.set(b"r")
    gates[name] = threading.Event()
    apart = [asyncio.create_task(way.run("a_apart", name=name)) for _ in range(APART)]
    for late in await asyncio.gather(*apart):
        assert isinstance(late, Failed)
    assert way.executor.leave(b"r"), "its threads go on"
    assert isinstance(await way.run("s_stuck", 5, name=name), Failed)
    assert await asyncio.to_thread(str, 1) == "1"
    gates[name].set()
    await until(busy(way), lambda n: n == 0)
    RUN.reset(run)


async def test_tasks_find_their_run(way: Way, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    run_id = uuid4()
    answer = f'["{run_id}","{kind}_asks",{{}},2]'
    assert await way.run(f"{kind}_asks", run_id=run_id) == Succeeded(answer.encode())
    assert [change.run for change in way.published] in ([], [run_id] * 2)


@pytest.mark.parametrize("reason", ["cancelled", "released", "lost"])
async def test_stopping_a_run_does_not_wait_for_it(way: Way, kind: str, reason: str) -> None:
    name, run_id = str(uuid4()), uuid4()
    gates[name] = threading.Event()
    execution = asyncio.create_task(way.run(f"{kind}_waits", run_id=run_id, name=name))

    async def begun() -> bool:
        return gates[name].is_set() if kind == "a" else calls[name] == 1

    await until(begun)
    execution.cancel(reason)
    with pytest.raises(asyncio.CancelledError):
        await execution
    assert await busy(way)() == int(kind == "s")
    published = way.states(run_id)
    gates[name].set()
    await until(busy(way), lambda n: n == 0)
    assert way.states(run_id) == published, "the thread's later changes are not published"
    if way.published:
        last = {"cancelled": ["Cancelled"], "released": ["Released"], "lost": []}[reason]
        assert published == ["Running", *last]
    if kind == "s":
        assert seen[name], "the thread can see the request to stop"


async def test_a_condition_that_goes_on_has_the_slot(way: Way) -> None:
    gates["condition"], run_id = threading.Event(), uuid4()
    run = RUN.set(run_id.bytes)
    execution = asyncio.create_task(way.run("s_hesitant", run_id=run_id))

    async def begun() -> bool:
        return seen.get("condition") == run_id

    await until(begun)
    execution.cancel("cancelled")
    with pytest.raises(asyncio.CancelledError):
        await execution
    assert way.executor.leave(run_id.bytes)
    gates["condition"].set()
    await until(busy(way), lambda n: n == 0)
    RUN.reset(run)


async def test_a_run_that_is_stopped_before_it_has_a_thread_never_starts(way: Way) -> None:
    names = [str(uuid4()) for _ in range(4)]
    gates.update({name: threading.Event() for name in names})
    runs = [asyncio.create_task(way.run("s_waits", name=name)) for name in names]
    await until(busy(way), lambda n: n == 4)
    runs[3].cancel("cancelled")
    with pytest.raises(asyncio.CancelledError):
        await runs[3]
    assert await busy(way)() == 3
    for name in names:
        gates[name].set()
    assert await asyncio.gather(*runs[:3]) == [Succeeded(b'"too late"')] * 3
    assert calls[names[3]] == 0


async def test_runs_side_by_side_do_not_mix(way: Way) -> None:
    ids = [uuid4() for _ in range(20)]
    answers = await asyncio.gather(*[way.run(("a", "s")[n % 2] + "_asks", run_id=one) for n, one in enumerate(ids)])
    for run_id, answer in zip(ids, answers, strict=True):
        assert isinstance(answer, Succeeded)
        assert str(run_id) in answer.body.decode()
    assert TaskRunContext.get() is None


async def test_a_cached_value_is_taken_on_either_way(way: Way, kind: str, tmp_path: Path) -> None:
    name = str(uuid4())
    first, second = uuid4(), uuid4()
    given = {"name": name, "more": {"b": 1, "a": [2.5, None]}}
    key = way.executor.cache_key(f"{kind}_cached", first, given)
    assert key is not None
    assert key == way.executor.cache_key(f"{kind}_cached", second, dict(reversed(given.items())))
    assert key != way.executor.cache_key(f"{kind}_cached", second, {"name": "another"})
    assert await way.run(f"{kind}_cached", run_id=first, **given) == Succeeded(b"1")
    assert await way.run(f"{kind}_cached", run_id=second, **given) == Succeeded(b"1")
    storage = way.executor.registered[f"{kind}_cached"].task.result_storage
    assert (tmp_path / "store" / storage._key(key)).exists(), "Prefect's engine computes the same key"
    if way.published:
        assert way.states(second) == ["Running", "Cached"]


async def test_tasks_without_a_cache_key(way: Way) -> None:
    for name, given in (("a_value", {"value": 1}), ("a_fresh", {"name": "x"}), ("a_cached", {"wrong": 1})):
        assert way.executor.cache_key(name, uuid4(), given) is None


async def test_a_cache_key_is_the_same_in_another_process(tmp_path: Path) -> None:
    code = """
import asyncio, sys, uuid
from backcast import store
from backcast.executor import registry
from backcast.executor.executor import Executor
from backcast.settings import Store
async def main():
    there = store.open_store(Store(url="file:///nowhere"))
    tasks = registry.discover(["tests.support.sample_tasks"])
    async with Executor(tasks, pool="p", max_attempts=1, store=there, threads=1) as e:
        print(e.cache_key("counted", uuid.uuid4(), {"name": "n", "payload": [1, {"a": "ä"}]}))
asyncio.run(main())
"""
    prefect = Prefect(api_url=None).environment()  # the settings of a worker; else Prefect starts a server of its own
    env = {**os.environ, **prefect, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")}
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=env | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    store = open_store(StoreSettings(url=f"file://{tmp_path}/other"))
    async with Executor(
        {"counted": sample_tasks.counted}, pool="p", max_attempts=1, store=store, threads=1
    ) as executor:
        ours = executor.cache_key("counted", uuid4(), {"name": "n", "payload": [1, {"a": "ä"}]})
    assert keys == {f"{ours}\n"}
    await store.aclose()


class Leaving:
    """A store that answers so many reads, and is then away."""

    def __init__(self, store: Store, reads: int) -> None:
        self.store, self.reads = store, reads

    async def get(self, key: str) -> bytes:
        self.reads -= 1
        if self.reads < 0:
            raise CacheAway("It is away.")
        return await self.store.get(key)

    async def put(self, key: str, body: bytes) -> None:
        await self.store.put(key, body)


async def test_a_store_that_goes_away_is_not_the_tasks_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value exists, and can't be read a moment later: the run waits for the store, whatever its retries are."""
    store = open_store(StoreSettings(url=f"file://{tmp_path}/store"))
    await store.ensure()
    leaving = Leaving(store, reads=100)
    tasks = {"counted": sample_tasks.counted}
    given = {"name": "c", "payload": 1}
    monkeypatch.chdir(tmp_path)  # the task counts its calls there
    async with Executor(tasks, pool="p", max_attempts=1, store=cast("Store", leaving), threads=1) as executor:
        first = await executor.execute("counted", uuid4(), given, retries=0)
        assert first == Succeeded(b"1")
        left = leaving.reads
        assert await executor.execute("counted", uuid4(), given, retries=0) == first, "it was cached"
        leaving.reads = left - leaving.reads - 1  # all but the last of the reads that a hit takes
        with pytest.raises(CacheAway):
            await executor.execute("counted", uuid4(), given, retries=0)
    await store.aclose()


async def test_hooks_and_names_run_on_prefects_engine_on_either_way(way: Way, kind: str) -> None:
    for fail, last in ((False, "Completed"), (True, "Failed")):
        run_id = uuid4()
        await way.run(f"{kind}_hooked", run_id=run_id, fail=fail)
        mine = [state for name, run, state in seen["hooks"] if run == run_id]
        assert mine == ["Running", last]
        if way.published:
            assert way.published[-1].label == f"hooked {fail}"


async def test_history_none_publishes_nothing_and_keeps_its_cache(way: Way) -> None:
    assert await way.run("a_quiet") == Succeeded(b"null")
    name = str(uuid4())
    assert await way.run("a_quiet_cached", name=name) == await way.run("a_quiet_cached", name=name) == Succeeded(b"1")
    assert way.published == []
    assert way.executor.registered["a_quiet"].type.lane == "quota"


async def test_attempts_are_published_as_one_run(on_prefect: Way, kind: str) -> None:
    run_id = uuid4()
    first = await on_prefect.run(f"{kind}_list", run_id=run_id)
    assert isinstance(first, Retry)
    await on_prefect.run(f"{kind}_list", first.retries, run_id=run_id)
    assert on_prefect.states(run_id) == ["Running", "AwaitingRetry"] * 2
    assert [change.attempts for change in on_prefect.published] == [1, 1, 2, 2]
    assert all(change.scheduled_for for change in on_prefect.published if change.name == "AwaitingRetry")
