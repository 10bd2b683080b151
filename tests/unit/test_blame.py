"""Whose doing it was that a loop did not answer, from what its threads did meanwhile: ten seconds of each case. And
which process can show its stacks then."""

import os
import signal
import subprocess
import sys
import tempfile
from uuid import UUID

import pytest

from backcast.process import marks, orphans
from backcast.process.marks import Mark
from backcast.worker.blame import Activity, Evidence, Fault, activity, can_dump, faults

LOOP, ONE, TWO, FOREIGN = 1, 2, 3, 4
A, B, C, D = (UUID(int=n) for n in range(4))
"""A's step is in the loop, B and C are in threads, D waits."""


@pytest.mark.parametrize(
    ("spent", "wakes", "expected"),
    [
        pytest.param({LOOP: 9.9, ONE: 0.0}, 5, {A: "own"}, id="it computes"),
        pytest.param({LOOP: 5.0, ONE: 5.0}, 2000, {A: "own"}, id="it computes, and another does too"),
        pytest.param({LOOP: 0.0, ONE: 0.0}, 0, {A: "own"}, id="it sleeps"),
        pytest.param({LOOP: 0.0, ONE: 10.0}, 0, {A: "own"}, id="it sleeps while another computes"),
        pytest.param({LOOP: 0.0, ONE: 5.0, TWO: 5.0}, 0, {A: "own"}, id="it sleeps while others compute"),
        pytest.param({LOOP: 0.1, ONE: 10.0}, 1900, {A: "unknown", B: "unknown"}, id="it waits for the lock"),
        pytest.param(
            {LOOP: 0.1, ONE: 5.0, TWO: 5.0},
            1900,
            {A: "unknown", B: "unknown", C: "unknown"},
            id="it waits, or sleeps in small steps, and others compute",
        ),
        pytest.param({LOOP: 0.1}, 1900, {A: "unknown", B: "unknown", C: "unknown"}, id="who has the lock sleeps"),
        pytest.param({LOOP: 0.4}, 9000, {A: "unknown", B: "unknown", C: "unknown"}, id="it sleeps in tiny steps"),
        pytest.param({LOOP: 0.1, FOREIGN: 9.0}, 1900, dict.fromkeys([A, B, C, D], "unknown"), id="a thread of a run's"),
        pytest.param({}, 0, {A: "own"}, id="the system shows nothing"),
    ],
)
def test_who_blocks_a_loop(spent: dict[int, float], wakes: int, expected: dict[UUID, Fault]) -> None:
    seen = [Mark(10, LOOP, A), Mark(20, ONE, B), Mark(30, TWO, C)]
    found = faults([A, B, C, D], Evidence(seen, silence=Activity(10.0, spent, wakes)))
    assert found == {run: expected.get(run, "other") for run in (A, B, C, D)}


@pytest.mark.parametrize(
    ("dump", "silence"),
    [
        pytest.param("", Activity(10.0, {LOOP: 0.0}, 2, waits=True), id="it waits for a lock, which any may have"),
        pytest.param(
            "Thread 0x0a (most recent call first):\n  Garbage-collecting\n  File x, line 1 in nap\n",
            Activity(10.0, {LOOP: 9.9}, 2),
            id="it collects garbage, which any may have left",
        ),
        pytest.param(
            "Thread 0x14 (most recent call first):\n  File x\n\nThread 0x0a (most recent call first):\n"
            '  File "x", line 1 in __del__\n  File "x", line 9 in nap\n',
            Activity(10.0, {LOOP: 0.0}, 2),
            id="it is in a destructor",
        ),
        pytest.param("Current thread 0x1f (most recent call first):\n  File x", None, id="another thread has ended it"),
        pytest.param("", None, id="it was ended from outside"),
    ],
)
def test_what_can_not_be_known(dump: str, silence: Activity | None) -> None:
    marks = [Mark(10, LOOP, A), Mark(20, ONE, None), Mark(30, TWO, None)]
    assert set(faults([A, B, C], Evidence(marks, dump, silence)).values()) == {"unknown"}


def test_who_has_called_exit() -> None:
    marks = [Mark(10, LOOP, A), Mark(20, ONE, B), Mark(30, TWO, C)]
    dump = "Thread 0x0a (most recent call first):\n  File x\n\nCurrent thread 0x14 (most recent call first):\n  File y"
    assert faults([A, B, C], Evidence(marks, dump)) == {A: "other", B: "own", C: "other"}


def test_who_has_the_lock_while_the_loop_is_between_two_steps() -> None:
    seen = [Mark(10, LOOP, None), Mark(20, ONE, B), Mark(30, TWO, C)]
    found = faults([B, C, D], Evidence(seen, silence=Activity(10.0, {LOOP: 0.1, ONE: 10.0}, 1900)))
    assert found == {B: "own", C: "other", D: "other"}


def test_a_run_by_itself_is_at_fault_only_where_there_was_never_another() -> None:
    seen = [Mark(10, LOOP, None)]
    assert faults([A], Evidence(seen)) == {A: "unknown"}
    assert faults([A], Evidence(seen, is_only=True)) == {A: "own"}


def test_marks_that_were_cut_off_show_nothing() -> None:
    with tempfile.TemporaryFile() as file:
        assert marks.read(file.fileno(), 2) == []
        assert marks.retries(file.fileno(), 2) == {}


@pytest.mark.parametrize(("handler", "is_stopped"), [("SIG_DFL", False), ("SIG_IGN", False), ("SIG_DFL", True)])
def test_which_process_writes_a_dump(handler: str, is_stopped: bool) -> None:
    code = f"import signal, sys; signal.signal(signal.SIGABRT, signal.{handler}); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if is_stopped:
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
        found = can_dump(process.pid)
        process.kill()
    assert found == (handler == "SIG_DFL" and not is_stopped)


def test_a_process_may_have_a_name_that_is_no_text() -> None:
    code = r"import ctypes, sys; ctypes.CDLL(None).prctl(15, b'\xff) T', 0, 0, 0); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert can_dump(process.pid)
        assert process.pid in activity(process.pid).spent
        assert orphans.lineage(process.pid)[:2] == [process.pid, os.getpid()]
