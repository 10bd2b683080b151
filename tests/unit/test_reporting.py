"""`progress` and `emit` without a worker."""

import asyncio
import gc
import json
import os
import sys
import threading
from typing import Any, cast

import pytest

import backcast
from backcast import protocol
from backcast.executor.reports import MOST_LINES, RunReports
from backcast.process.channel import Channel, Message
from backcast.reporting import REPORTER


class Kept:
    def __init__(self) -> None:
        self.reports = list[Any]()

    def progress(self, fraction: float | None, message: str) -> None:
        self.reports.append((fraction, message))

    def emit(self, kind: str, data: Any) -> None:
        self.reports.append((kind, data))


def test_outside_of_a_run_nothing_happens() -> None:
    backcast.progress(0.5, "half")
    backcast.emit({"page": 1})


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_fraction_is_within_0_and_1(fraction: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        backcast.progress(fraction)


@pytest.mark.parametrize("kind", ["", "x" * 101])
def test_a_kind_has_a_name(kind: str) -> None:
    with pytest.raises(ValueError, match="1 to 100 characters"):
        backcast.emit(1, kind=kind)


async def test_the_context_decides_whose_report_it_is() -> None:
    first, second = Kept(), Kept()

    async def run(kept: Kept, n: int) -> None:
        REPORTER.set(kept)
        await asyncio.to_thread(backcast.progress, n / 2, "x" * 600)
        backcast.emit(n)

    await asyncio.gather(run(first, 1), run(second, 2))
    assert first.reports == [(0.5, "x" * 500), ("output", 1)]
    assert second.reports == [(1.0, "x" * 500), ("output", 2)]


class Sent:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.lines, self.size = list[str](), 0

    def send(self, message: Message) -> None:
        self.size += len(message.body)
        self.lines += [json.loads(line.text)["message"] for line in protocol.reported(message).lines]


async def test_lines_beyond_the_limit_are_counted() -> None:
    sent = Sent()
    reports = RunReports(bytes(16), cast("Channel", sent), lambda: 0)
    reports.write("stdout", "begun, ")
    reports.write("stdout", "ended\n" + "x\n" * (MOST_LINES + 1) + "begun again")
    reports.write("stdout", ", ended\n\nunfinished")
    reports.close()
    assert sent.lines == ["begun, ended", *["x"] * (MOST_LINES - 1), "5 further lines were dropped"]


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "long" * 10_000])
async def test_any_name_of_a_logger_or_a_level_can_be_sent(name: str) -> None:
    sent = Sent()
    reports = RunReports(bytes(16), cast("Channel", sent), lambda: 0)
    reports.log(name, name, "a line")
    reports.close()
    assert sent.lines == ["a line"]
    assert sent.size < 1000


async def test_variables_may_come_and_go_while_lines_are_sent() -> None:
    is_over, sent = threading.Event(), Sent()

    def come_and_go() -> None:
        while not is_over.is_set():
            os.environ["PASSING_TOKEN"] = "correct-horse"
            del os.environ["PASSING_TOKEN"]

    passing, interval = threading.Thread(target=come_and_go), sys.getswitchinterval()
    passing.start()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(1000):
            reports = RunReports(bytes(16), cast("Channel", sent), lambda: 0)
            reports.write("stdout", "a line\n")
            reports.close()
    finally:
        sys.setswitchinterval(interval)
        is_over.set()
        passing.join()
    assert sent.lines == ["a line"] * 1000


async def test_destructors_may_write_wherever_a_report_allocates() -> None:
    sent, count = Sent(), 500
    reports = RunReports(bytes(16), cast("Channel", sent), lambda: 0)

    class Garbage:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            reports.write("stderr", "gone\n")

    async def report() -> None:
        for n in range(count):
            Garbage()
            reports.write("stdout", f"{n}\n")
            reports.emit("number", n)
            reports.progress(None, str(n))
            await asyncio.sleep(0)

    threshold = gc.get_threshold()
    gc.set_threshold(7)
    try:
        await report()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    reports.close()
    assert [line for line in sent.lines if line != "gone"] == [str(n) for n in range(count)]
    assert sent.lines.count("gone") == count
