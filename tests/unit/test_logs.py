"""Log lines: one an event, with the run that it is about, as text and as JSON."""

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from backcast.process.logs import RUN, Format, configure_logging

log = logging.getLogger("backcast.test")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("backcast")
    handlers, level, own = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(own)


def lines(capsys: pytest.CaptureFixture[str], form: Format) -> list[str]:
    configure_logging("info", form, worker="w")

    async def work() -> None:
        RUN.set(("r", "extract"))
        log.warning("slow: %d s", 3)

    log.info("plain")
    log.debug("not logged")
    asyncio.run(work())
    logging.getLogger("prefect.task_runs").warning("theirs", extra={"task_run_id": "p", "task_name": "other"})
    try:
        raise ValueError("wrong")
    except ValueError:
        log.exception("failed", extra={"fields": {"status": 500, "none": None}})
    return capsys.readouterr().err.splitlines()


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    plain, slow, theirs, failed = map(json.loads, lines(capsys, "json"))
    for entry in (plain, slow, theirs, failed):
        assert entry.pop("time").endswith("Z")
        assert entry.pop("worker") == "w"
    assert plain == {"level": "info", "message": "plain", "logger": "backcast.test"}
    about = {"run": "r", "task": "extract"}
    assert slow == {"level": "warning", "message": "slow: 3 s", "logger": "backcast.test", **about}
    assert (theirs["run"], theirs["task"]) == ("p", "other")
    assert failed["traceback"].splitlines()[-1] == "ValueError: wrong"
    assert (failed["status"], "none" in failed) == (500, False)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    plain, slow, theirs, failed, *traceback = lines(capsys, "text")
    assert plain[24:] == " INFO    plain worker=w"
    assert slow[24:] == " WARNING slow: 3 s run=r task=extract worker=w"
    assert theirs[24:] == " WARNING theirs run=p task=other worker=w"
    assert failed[24:] == " ERROR   failed worker=w status=500"
    assert traceback[-1] == "ValueError: wrong"
