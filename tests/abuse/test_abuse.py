"""Nothing that a task does can hurt its worker, or the runs beside it: each misbehaviour beside twenty ordinary runs.

`max_attempts` is 1: a run for which another's doing counted would fail.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
import pytest_asyncio

from backcast.local.postgres import Postgres
from backcast.worker.executors import QUARANTINES
from tests.support import databases
from tests.support.stack import ROOT, Stack, stack
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEIGHBOURS = 20
STALL = 3.0
GRACE = 10
"""Seconds: a drain waits for a run of one second also on a machine that has much else to do."""
MEMORY = 512
"""MiB."""
SECRET = "correct-horse-battery-staple"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def others(server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """All but the worker, which each test has for itself."""
    async with stack(
        databases.create(server, "abuse"),
        tmp_path_factory.mktemp("abuse"),
        BACKCAST_TASKS="tests.abuse.tasks",
        BACKCAST_BUILTIN_TASKS="false",
        BACKCAST_MAX_ATTEMPTS="1",
        BACKCAST_WORKER__SLOTS="40",
        BACKCAST_WORKER__STALL=str(STALL),
        BACKCAST_WORKER__MAX_MEMORY=str(MEMORY << 20),
        BACKCAST_WORKER__GRACE=str(GRACE),
        BACKCAST_API__KEYS="",
        BACKCAST_STORE__SECRET_KEY=SECRET,
        BACKCAST_STORE__ACCESS_KEY="access",
    ) as running:
        await running.up("api", "steward")
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def product(others: Stack) -> AsyncIterator[Stack]:
    api, steward = others.parts
    try:
        await others.up("worker")
        others.parts[:] = [api, others.parts[-1], steward]
        yield others
    finally:
        for part in others.parts:
            if part not in (api, steward):
                part.kill()
        others.parts[:] = [api, steward]
        connection = await asyncpg.connect(others.database)
        await connection.execute("set search_path = backcast; delete from runs; delete from workers")
        await connection.close()


async def beside(product: Stack, task: str, **given: Any) -> dict[str, Any]:
    """The end of a run of this task, beside twenty ordinary runs that complete in their first counted attempt."""
    before = [await product.submit("nap", seconds=0.5) for _ in range(NEIGHBOURS // 4)]
    before += [await product.submit("sync_nap", seconds=0.3) for _ in range(NEIGHBOURS // 4)]
    offender = await product.submit(task, **given)
    after = [await product.submit("nap", seconds=0.1) for _ in range(NEIGHBOURS // 2)]
    for run in [await product.ended(each) for each in before + after]:
        assert run["state"] == "completed", run
        assert run["attempts"] == 1, run
    return await product.ended(offender)


async def still_serves(product: Stack) -> None:
    """The pool works, the worker is ready, and a SIGTERM still drains it."""
    assert await product.result(await product.submit("nap", seconds=0.05)) == 0.05
    worker = product.parts[1]
    await worker.ready()
    last = await product.submit("nap", seconds=1)
    await product.state(last, "running")
    worker.process.terminate()
    assert await worker.ended() == 0, worker.text
    assert (await product.run(last))["state"] == "completed", "the drain waited for it"


FAILING = {
    "spin": "blocked_worker",
    "spin_later": "blocked_worker",
    "spin_under_a_name_that_is_no_text": "blocked_worker",
    "sleep_in_the_loop": "blocked_worker",
    "hold_gil": "blocked_worker",
    "hold_gil_in_the_loop": "blocked_worker",
    "steal_signals_and_spin": "blocked_worker",
    "stop_its_process": "blocked_worker",
    "spin_in_the_key": "blocked_worker",
    "exit_in_task": "task_failed",
    "exit_in_thread": "task_failed",
    "exit_in_child": "task_failed",
    "interrupt": "task_failed",
    "generator_exit": "task_failed",
    "generator_exit_in_the_loop": "task_failed",
    "long_message": "task_failed",
    "unprintable": "task_failed",
    "new_loop": "task_failed",
    "stop_iteration": "task_failed",
    "group_of_exits": "task_failed",
    "exit_in_the_key": "task_failed",
    "unreadable": "executor_disturbed",
    "nested": "unserialisable_result",
    "unserialisable": "unserialisable_result",
    "os_exit": "executor_died",
    "os_exit_in_thread": "executor_died",
    "abort": "executor_died",
    "segfault": "executor_died",
    "segfault_in_thread": "executor_died",
    "kill_itself": "executor_died",
    "terminate_itself": "executor_died",
    "kill_its_group": "executor_died",
    "signal_its_worker": "signalled_worker",
    "signal_its_worker_by_a_shell": "signalled_worker",
    "signal_its_worker_again_and_again": "signalled_worker",
    "close_descriptors": "executor_died",
    "close_the_loop": "task_failed",
    "stop_and_close_the_loop": "executor_died",
    "hog": "out_of_memory",
    "hog_in_a_process": "out_of_memory",
    "send_garbage": "executor_died",
    "sleep_on": "timeout",
    "never_late": "timeout",
    "sleep_on_in_other_threads": "timeout",
    "cancel_all": "executor_disturbed",
    "exit_in_a_thread_of_its_own": "executor_died",
    "shell": "timeout",
}
COMPLETING: dict[str, Any] = {
    "exit_in_callback": "survived",
    "stop_the_loop": "survived",
    "shout": "shouted",
    "shout_lines": "shouted",
    "chatter": "chattered",
    "steal_signals": 1,
    "borrow_signals": "given back",
    "recurse_little": "shallow",
    "forks": 200,
    "fork_bomb": "parent",
    "fork_in_the_loop": "parent",
    "fork_and_wait_in_the_loop": "parent",
    "fork_in_a_thread": "parent",
    "fork_while_it_reports": 0,
    "fork_in_a_callback": "parent",
    "fork_and_exit_in_a_callback": "parent",
    "interrupt_the_loop": "interrupted",
    "wander": "wandered",
    "leave_a_task": "left",
    "threads": "started",
    "empty_files": "rude",
    "huge": "h" * 20_000_000,
}


@pytest.mark.parametrize("task", FAILING)
async def test_only_the_run_that_misbehaves_fails(product: Stack, task: str) -> None:
    run = await beside(product, task)
    assert run["state"] == "failed", run
    assert run["error"]["code"] == FAILING[task], run
    assert len(run["error"]["detail"]) < 10_000
    await still_serves(product)


@pytest.mark.parametrize(
    "task",
    [
        "sleep_in_the_loop",
        "sleep_in_steps_in_the_loop",
        "sleep_with_the_gil",
        "hold_gil",
    ],
)
async def test_who_computes_is_not_at_fault_when_another_blocks(product: Stack, task: str) -> None:
    busy = [await product.submit("crunch") for _ in range(4)]
    for run in busy:
        await product.state(run, "running")
    offender = await product.ended(await product.submit(task))
    assert offender["error"]["code"] == "blocked_worker", offender
    for run in [await product.ended(each) for each in busy]:
        assert (run["state"], run["attempts"]) == ("completed", 1), run
    assert f"in {task}" in product.parts[1].text, "its stack is in the log"


@pytest.mark.parametrize("task", ["leave_a_bomb", "leave_a_callback", "leave_a_canceller"])
async def test_who_is_the_only_one_is_not_at_fault_for_what_an_earlier_run_has_left(
    product: Stack, tmp_path: Path, task: str
) -> None:
    fuse = tmp_path / "fuse"
    assert await product.result(await product.submit(task, fuse=str(fuse))) == "left"
    run = await product.submit("nap", seconds=2 * STALL)
    await product.state(run, "running")
    fuse.touch()
    await until(lambda: is_there(fuse), lambda there: not there)
    ended = await product.ended(run)
    assert (ended["state"], ended["attempts"]) == ("completed", 1), ended


async def test_a_run_whose_process_others_end_again_and_again_gets_one_of_its_own(
    product: Stack, tmp_path: Path
) -> None:
    victim = await product.submit("redirects", folder=str(tmp_path))
    for _ in range(6):
        await until(lambda: is_there(tmp_path / "redirected"))
        (tmp_path / "redirected").unlink()
        await product.ended(await product.submit("os_exit"))
    (tmp_path / "print").touch()
    assert await product.result(victim) == "mine\n"
    assert (await product.run(victim))["attempts"] == 1
    attempts = (await product.http.get(f"/v1/runs/{victim}/attempts")).json()
    assert [each["outcome"] for each in attempts["items"]] == ["released"] * 5 + ["succeeded"]


async def test_who_announces_a_huge_message_fills_nobodys_memory(product: Stack) -> None:
    worker = product.parts[1].process.pid
    before = psutil.Process(worker).memory_info().rss
    run = await beside(product, "send_garbage", megabytes=500)
    assert run["error"]["code"] == "executor_died"
    assert psutil.Process(worker).memory_info().rss - before < 200 << 20
    await still_serves(product)


@pytest.mark.parametrize("task", COMPLETING)
async def test_what_is_only_rude_completes(product: Stack, task: str) -> None:
    run = await beside(product, task)
    assert run["state"] == "completed", run
    answer = await product.http.get(f"/v1/runs/{run['id']}/result")
    assert answer.json() == COMPLETING[task]
    await still_serves(product)


NOT_BORNE = ["replace_streams", "delete_streams", "leave_a_closed_stream", "forbid_recursion"]
PUT_BACK = [
    *NOT_BORNE,
    "close_streams",
    "close_descriptors_of_streams",
    "empty_lists",
    "handle_signals",
    "log_to_nowhere",
    "set_time_out",
    "make_errors_of_warnings",
    "switch_seldom",
    "remove_the_hook",
    "filter_logs",
    "remove_the_folder",
    "set_an_alarm",
    "limit_memory",
    "limit_file_sizes",
    "clear_the_import_path",
    "change_the_loop",
    "trace_all",
    "change_the_locale",
    "block_signals",
    "wander",
]


async def test_what_a_run_changes_for_all_is_put_back_when_it_ends(product: Stack) -> None:
    pids = executors(product)
    for task in PUT_BACK:
        await product.result(await product.submit(task))
        assert await product.result(await product.submit("relies")) == [], task
        assert await product.result(await product.submit("relies_on_the_loop")) == [], task
    assert executors(product) == pids, "none of it takes a new process"
    await still_serves(product)


def executors(product: Stack) -> set[str]:
    worker = product.parts[1].process.pid
    return set(Path(f"/proc/{worker}/task/{worker}/children").read_text().split())


async def test_what_others_can_bear_stays_while_a_run_may_need_it(product: Stack, tmp_path: Path) -> None:
    run = await product.submit("redirects", folder=str(tmp_path))
    await until(lambda: is_there(tmp_path / "redirected"))
    await product.result(await product.submit("nap", seconds=0.05))
    (tmp_path / "print").touch()
    assert await product.result(run) == "mine\n"
    assert await product.result(await product.submit("relies")) == []


async def test_what_others_cannot_bear_is_put_back_while_a_run_goes_on(product: Stack, tmp_path: Path) -> None:
    run = await product.submit("redirects", folder=str(tmp_path))
    await until(lambda: is_there(tmp_path / "redirected"))
    for task in NOT_BORNE:
        await product.result(await product.submit(task))
        assert await product.result(await product.submit("relies")) == [], task
    (tmp_path / "print").touch()
    await product.result(run)


async def test_functions_need_no_thread_that_starts_in_the_state_that_a_run_has_left(
    product: Stack, tmp_path: Path
) -> None:
    run = await product.submit("trace_new_threads", folder=str(tmp_path))
    await until(lambda: is_there(tmp_path / "traced"))
    for nap in [await product.submit("sync_nap", seconds=0.1) for _ in range(NEIGHBOURS)]:
        assert await product.result(nap) == 0.1
    (tmp_path / "end").touch()
    await product.result(run)
    assert await product.result(await product.submit("relies")) == []


async def is_there(path: Path) -> bool:
    return path.exists()


@pytest.mark.parametrize(
    ("task", "given"),
    [("limit_files", {}), ("keep_files_open", {}), ("ignore_children", {}), ("threads", {"count": 700})],
)
async def test_an_executor_in_which_something_is_lost_for_good_is_replaced(
    product: Stack, task: str, given: dict[str, Any]
) -> None:
    [pid] = executors(product)
    await product.result(await product.submit(task, **given))
    await until(lambda: is_replaced(product, pid))
    assert await product.result(await product.submit("relies")) == []
    assert await product.result(await product.submit("relies_on_the_loop")) == []
    await still_serves(product)


async def test_in_quarantine_nobody_gets_a_process_in_which_something_is_lost_for_good(
    product: Stack, tmp_path: Path
) -> None:
    [pid] = executors(product)
    runs = [await product.submit("keep_files_open", fuse=str(tmp_path / "fuse")) for _ in range(2 * QUARANTINES)]
    for run in runs:
        await product.state(run, "running")
    await product.submit("kill_itself")
    await until(lambda: is_replaced(product, pid))
    (tmp_path / "fuse").touch()
    for run in runs:
        assert await product.result(run) == "rude"


async def test_an_executor_that_has_grown_is_replaced_without_a_gap(product: Stack) -> None:
    [pid] = executors(product)
    beside = await product.submit("nap", seconds=6)
    await product.state(beside, "running")
    assert await product.result(await product.submit("grow", megabytes=MEMORY * 11 // 10)) == "large"
    await until(lambda: is_replaced(product, pid))
    assert await product.result(await product.submit("nap", seconds=0.05)) == 0.05
    await product.result(beside)
    attempts = (await product.http.get(f"/v1/runs/{beside}/attempts")).json()["items"]
    assert [each["outcome"] for each in attempts] == ["succeeded"]
    assert "replacing executor" in product.parts[1].text
    await still_serves(product)


@pytest.mark.parametrize("task", ["sleep_on", "sleep_on_in_other_threads", "never_late"])
async def test_what_goes_on_when_it_is_late_costs_an_executor_and_no_slot(product: Stack, task: str) -> None:
    [pid] = executors(product)
    runs = [await product.submit(task) for _ in range(10)]
    for run in runs:
        assert (await product.ended(run))["error"]["code"] == "timeout"
    await until(lambda: is_replaced(product, pid))
    await until(lambda: lost(product), lambda count: count == 0)
    await still_serves(product)


async def test_what_goes_on_when_it_is_late_keeps_nobody_from_its_retry(product: Stack, tmp_path: Path) -> None:
    pids = executors(product)
    run = await product.submit("sleep_on_at_first", marks=str(tmp_path / "marks"))
    assert await product.result(run) == "in time"
    assert (await product.run(run))["attempts"] == 2
    assert await lost(product) == 1, "its code goes on"
    assert executors(product) >= pids
    await still_serves(product)


async def test_who_waits_for_a_lock_is_not_at_fault(product: Stack) -> None:
    keeper = await product.submit("keep_the_lock_of_logs", seconds=2 * STALL)
    await product.state(keeper, "running")
    runs = [await product.submit("logs") for _ in range(3)]
    for run in [await product.ended(each) for each in (keeper, *runs)]:
        assert (run["state"], run["attempts"]) == ("completed", 1), run
    assert "ended by SIGABRT" in product.parts[1].text


async def test_an_executor_may_end_while_its_successor_starts(product: Stack) -> None:
    async def begins() -> bool:
        return "replacing executor" in product.parts[1].text

    await product.result(await product.submit("keep_files_open"))
    await until(begins)
    for _ in range(3):
        assert (await product.ended(await product.submit("kill_itself")))["error"]["code"] == "executor_died"
        assert await product.result(await product.submit("nap", seconds=0.05)) == 0.05
    await until(lambda: count(product), lambda executors: executors == 1)


async def test_an_executor_is_replaced_that_ends_while_the_one_before_it_has_a_run(product: Stack) -> None:
    await product.state(await product.submit("nap", seconds=3600), "running")
    await product.result(await product.submit("keep_files_open"))
    await until(lambda: metric(product, 'executors_ended_total{cause="replaced"}'), lambda count: count == 1)
    assert (await product.ended(await product.submit("kill_itself")))["error"]["code"] == "executor_died"
    assert await product.result(await product.submit("nap", seconds=0.05)) == 0.05
    assert await count(product) == 2


async def count(product: Stack) -> int:
    return len(executors(product))


async def is_replaced(product: Stack, pid: str) -> bool:
    return pid not in executors(product)


async def test_the_error_of_a_blocked_run_shows_where(product: Stack) -> None:
    run = await beside(product, "spin_later")
    assert "in _spin" in run["error"]["detail"]


async def test_who_swallows_a_cancellation_is_cancelled_all_the_same(product: Stack) -> None:
    runs = [await product.submit("stubborn") for _ in range(12)]
    for run in runs:
        await product.state(run, "running")
    await asyncio.gather(*(product.http.post(f"/v1/runs/{run}/cancel") for run in runs))
    for run in runs:
        await product.state(run, "cancelled")
    # More than a quarter of its slots are lost: the executor is replaced, and all slots are there again.
    await until(lambda: lost(product), lambda count: count == 0, timeout=PATIENCE)
    await still_serves(product)


async def test_what_raises_when_it_is_cancelled_takes_no_executor(product: Stack) -> None:
    pids = executors(product)
    run = await product.submit("uncancellable")
    await product.state(run, "running")
    await product.http.post(f"/v1/runs/{run}/cancel")
    await product.state(run, "cancelled")
    assert await lost(product) == 1, "its code goes on"
    assert executors(product) == pids
    await still_serves(product)


async def lost(product: Stack) -> float:
    return await metric(product, "worker_slots_lost")


async def metric(product: Stack, name: str) -> float:
    lines = (await product.http.get(product.parts[1].metrics_url)).text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(f"backcast_{name} ")), 0.0)


async def test_a_drain_ends_whatever_the_code_does(product: Stack) -> None:
    runs = [await product.submit("stubborn"), await product.submit("sleep_in_the_loop")]
    for run in runs:
        await product.state(run, "running")
    began = time.monotonic()
    worker = product.parts[1]
    worker.process.terminate()
    assert await worker.ended() == 0
    assert time.monotonic() - began < GRACE + 5 + 5, "grace and five seconds, and what a loaded machine takes"
    for run in runs:
        state = (await product.run(run))["state"]
        assert state in ("queued", "failed"), "released, or failed as it has blocked"


@pytest.mark.parametrize("task", ["fork_and_leave", "leave_a_server", "leave_a_daemon"])
async def test_what_a_run_leaves_behind_ends_with_its_executor(product: Stack, task: str) -> None:
    left = await product.result(await product.submit(task))
    pid = left if isinstance(left, int) else left[0]
    assert Path(f"/proc/{pid}").exists()
    await product.ended(await product.submit("kill_itself"))
    await until(lambda: lives(pid), lambda there: not there)


async def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]


async def test_what_a_run_leaves_behind_ends_with_its_worker(product: Stack) -> None:
    pid = await product.result(await product.submit("leave_a_shell"))
    assert await lives(pid)
    worker = product.parts[1]
    worker.process.terminate()
    assert await worker.ended() == 0
    await until(lambda: lives(pid), lambda there: not there)


async def test_a_run_with_a_process_of_its_own_disturbs_nobody(product: Stack) -> None:
    """Its neighbours are not even executed again."""
    neighbours = [await product.submit("nap", seconds=3) for _ in range(5)]
    pids = [await product.result(await product.submit("who_apart")) for _ in range(2)]
    assert len(set(pids)) == 2, "a fresh one each"
    crashed, late = await product.ended(await product.submit("crash_apart")), await product.submit("sleep_on_apart")
    assert crashed["error"]["code"] == "executor_died"
    assert (await product.ended(late))["error"]["code"] == "timeout"
    for run in neighbours:
        assert await product.result(run) == 3
    assert "ended by SIGSEGV, with 1 runs" in product.parts[1].text
    assert (await lost(product)) == 0, "the thread that slept on has ended with its process"


async def test_a_task_may_have_leave_to_block(product: Stack) -> None:
    assert await product.result(await product.submit("block_with_leave", seconds=2 * STALL)) == "blocked"


async def test_who_has_leave_to_block_gives_it_to_no_other(product: Stack) -> None:
    lenient = await product.submit("wait_with_leave")
    await product.state(lenient, "running")
    assert (await product.ended(await product.submit("spin")))["error"]["code"] == "blocked_worker"
    await product.state(lenient, "running")
    await still_serves(product)


@pytest.mark.parametrize("task", ["fork_in_a_callback", "fork_and_exit_in_a_callback"])
async def test_a_fork_does_no_step_of_another_run(product: Stack, tmp_path: Path, task: str) -> None:
    noting = await product.submit("note_steps", folder=str(tmp_path))
    await product.state(noting, "running")
    assert await product.result(await product.submit(task)) == "parent"
    (tmp_path / "end").touch()
    steps = await product.result(noting)
    assert (tmp_path / "steps").read_text().split() == [str(step) for step in range(steps)]


async def test_a_module_that_forks_makes_one_executor(database: str, tmp_path: Path) -> None:
    async with stack(
        database, tmp_path, BACKCAST_TASKS="tests.abuse.forking", BACKCAST_BUILTIN_TASKS="false"
    ) as product:
        await product.up("api", "worker", "steward")
        executor = psutil.Process(await product.result(await product.submit("executor")))
        assert executor.ppid() == product.parts[1].process.pid

        async def copies() -> list[psutil.Process]:
            return [each for each in executor.children() if each.status() != psutil.STATUS_ZOMBIE]

        await until(copies, lambda living: not living)


async def test_retries_pay_for_no_deaths(database: str, tmp_path: Path) -> None:
    """It fails three times, then kills its process: `max_attempts` executors end, and no more."""
    env = {"BACKCAST_TASKS": "tests.abuse.tasks", "BACKCAST_BUILTIN_TASKS": "false", "BACKCAST_MAX_ATTEMPTS": "3"}
    async with stack(database, tmp_path, **env) as product:
        await product.up("api", "worker", "steward")
        marks = tmp_path / "marks"
        run = await product.ended(await product.submit("kills_after_retries", marks=str(marks)))
        assert run["state"] == "failed", run
        executions = marks.read_text().count("x")
        assert executions == 3 * 4, "it has killed three executors"
        assert run["attempts"] == executions, "each execution counts once, also one that begins just before a kill"


async def test_a_run_that_ends_its_executors_does_not_wait_for_its_neighbours(database: str, tmp_path: Path) -> None:
    env = {"BACKCAST_TASKS": "tests.abuse.tasks", "BACKCAST_BUILTIN_TASKS": "false", "BACKCAST_MAX_ATTEMPTS": "3"}
    async with stack(database, tmp_path, **env) as product:
        await product.up("api", "worker", "steward")
        neighbour = await product.submit("nap", seconds=3600)
        await product.state(neighbour, "running")
        run = await product.ended(await product.submit("crash_apart"))
        assert (run["state"], run["attempts"], run["error"]["code"]) == ("failed", 3, "executor_died")
        assert (await product.run(neighbour))["state"] == "running"


async def test_executors_go_on_without_a_temporary_folder(database: str, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    env = {"BACKCAST_TASKS": "tests.abuse.tasks", "BACKCAST_BUILTIN_TASKS": "false", "BACKCAST_MAX_ATTEMPTS": "1"}
    async with stack(database, tmp_path, TMPDIR=str(tmp_path / "temporary"), **env) as product:
        await product.up("api", "worker", "steward")
        offender = await product.ended(await product.submit("remove_the_temporary_folder"))
        assert offender["error"]["code"] == "executor_died", offender
        await still_serves(product)


async def test_an_executor_that_hangs_while_it_imports_the_tasks_is_ended(database: str, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(10**6)\n")
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "BACKCAST_TASKS": "hangs", "BACKCAST_BUILTIN_TASKS": "false"}
    async with stack(database, tmp_path, BACKCAST_WORKER__START="1", **env) as product:
        worker = product.start("worker")
        assert await worker.ended() != 0
        assert "it has not imported the tasks within 1 s" in worker.text
        assert "The tasks can't be served" in worker.text


async def test_a_task_finds_no_secrets(product: Stack) -> None:
    found = await product.result(await product.submit("secrets"))
    for where, text in found.items():
        assert SECRET not in text, where
        assert "postgresql://" not in text, where


async def test_a_supervisor_imports_neither_prefect_nor_marvin_nor_the_tasks(tmp_path: Path) -> None:
    code = (
        "import sys, backcast.worker.main; print([m for m in ('prefect', 'marvin', 'pydantic_ai') if m in sys.modules])"
    )
    import sys

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.decode().strip() == "[]"
