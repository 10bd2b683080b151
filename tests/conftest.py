"""What holds for every tier."""

import signal
from collections.abc import Generator

import pytest


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
