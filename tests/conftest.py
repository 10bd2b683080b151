"""Settings and hooks for every tier of tests."""

import os
import signal
from collections.abc import Generator

import pytest

from backcast.settings import Prefect
from tests.support.stack import free_port

# Prefect reads its settings when the first test imports it. As in a worker, it must not start a server of its own; and
# it reaches none, because no process listens on this port.
os.environ.update(Prefect(api_url=f"http://127.0.0.1:{free_port()}/api").environment())


def pytest_configure() -> None:
    # A shell starts background jobs with SIGINT ignored. The processes that tests interrupt would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup: a handler is not inherited, and ends nothing
        signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    # Tests of hostile input may log lone surrogates, which xdist can't send to its main process.
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
