"""Gives each run the lines that its code logs and prints, beside where they go anyway. Decides which lines these are:
those of any logger, from level INFO on, and what is written to stdout and stderr, in the context of the run.
"""

import contextlib
import io
import logging
import sys
from typing import Any, TextIO

from backcast.reporting import REPORTER

_CHATTY = ("httpx", "httpcore")
"""Loggers that write a line for every request that the libraries of a task make."""
_FORMATTER = logging.Formatter()


def install() -> None:
    """Take the lines of runs from here on. The log of the process shows what it did before."""
    root = logging.getLogger()
    for handler in root.handlers:
        handler.addFilter(_is_shown)
    root.setLevel(min(root.level, logging.INFO))
    for name in _CHATTY:
        if not (logger := logging.getLogger(name)).level:
            logger.setLevel(logging.WARNING)
    root.addHandler(_Handler())
    sys.stdout, sys.stderr = _Stream(sys.stdout, "stdout"), _Stream(sys.stderr, "stderr")


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether the log of the process shows it: warnings, and what a logger's own level asks for."""
    if record.levelno >= logging.WARNING:
        return True
    logger = logging.getLogger(record.name)
    while logger.parent is not None:
        if logger.level:
            return True
        logger = logger.parent
    return False


class _Handler(logging.Handler):
    def handle(self, record: logging.LogRecord) -> bool:
        """Without the handler's lock: a destructor may log while the loop has the lock of a run's reports."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        if (reporter := REPORTER.get()) is None:
            return
        try:
            text = record.getMessage()
            if record.exc_info and record.exc_info[0] is not None:
                text += "\n" + _FORMATTER.formatException(record.exc_info)
        except Exception:  # noqa: BLE001  # arguments that do not fit the message; logging itself shows such an error
            text = str(record.msg)
        reporter.log(str(record.levelname), str(record.name), text)


class _Stream:
    """A stream that also gives its run what is written. It belongs to all runs, so that none can close it."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        if (reporter := REPORTER.get()) is not None:
            reporter.write(self._name, text)
        with contextlib.suppress(ValueError, OSError):  # its buffer is closed, or its descriptor
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(ValueError, OSError):
            self._stream.flush()

    def close(self) -> None:
        self.flush()

    def detach(self) -> Any:
        raise io.UnsupportedOperation("this stream belongs to all runs of the process")

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
