"""What holds for every tier."""

import os
import signal
from collections.abc import Generator

import pytest

from backcast.settings import Prefect
from tests.support.stack import free_port
from tests.support.waiting import PATIENCE

# Prefect reads its settings when it is imported, whichever test does it first. As in a worker, it is to start no server
# of its own; and there is none at all, as nobody listens there.
os.environ.update(Prefect(api_url=f"http://127.0.0.1:{free_port()}/api").environment())


def pytest_configure() -> None:
    # A shell starts what it runs in the background with SIGINT ignored, and so would be what tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The waits of a test end first, and print what they saw; this is for what hangs without one.
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(5 * PATIENCE))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    # What tests of hostile input have logged may have lone surrogates, which xdist can't send to its main process.
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
