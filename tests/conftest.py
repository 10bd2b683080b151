"""What holds for every tier."""

import os
import signal
from collections.abc import Generator

import pytest

from backcast.settings import Prefect
from tests.support.stack import free_port

# Prefect reads its settings when it is imported, whichever test does it first. As in a worker, it is to start no server
# of its own; and there is none at all, as nobody listens there.
os.environ.update(Prefect(api_url=f"http://127.0.0.1:{free_port()}/api").environment())


def pytest_configure() -> None:
    # A shell starts what it runs in the background with SIGINT ignored, and so would be what tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    # What tests of hostile input have logged may have lone surrogates, which xdist can't send to its main process.
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
