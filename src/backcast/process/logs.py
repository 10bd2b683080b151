"""Sets up the log of a process: one line per event, as text or as a JSON object, with the run that it is about."""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from backcast.process import tracing

RUN: ContextVar[tuple[object, str] | None] = ContextVar("run", default=None)
"""The run (id and task) that the code of this context works on."""
Format = Literal["text", "json"]


def configure_logging(level: str, form: Format = "text", **fields: object) -> None:
    """Log to stderr. `fields`, such as the worker's id, are part of every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(fields) if form == "json" else _Text(fields))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("backcast").setLevel(level.upper())


class _Lines(logging.Formatter):
    def __init__(self, fields: dict[str, object]) -> None:
        super().__init__()
        self._fields = fields

    def _of(self, record: logging.LogRecord) -> dict[str, object]:
        """The fields of a line beside its message. Prefect's loggers keep the run in the record."""
        run = RUN.get()
        if (named := getattr(record, "task_run_id", None)) is not None:
            run = named, str(getattr(record, "task_name", None))
        about: dict[str, object] = {} if run is None else {"run": str(run[0]), "task": run[1]}
        if (trace := tracing.trace_id()) is not None:
            about["trace"] = trace
        return about | self._fields | getattr(record, "fields", {})

    def _traceback(self, record: logging.LogRecord) -> str | None:
        return self.formatException(record.exc_info) if record.exc_info else record.exc_text


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Text(_Lines):
    """`2030-01-31T08:00:00.000Z INFO    the message run=… task=… worker=…`, and a traceback in further lines."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in self._of(record).items() if value is not None)
        line = f"{_time(record)} {record.levelname:7} {record.getMessage()}{fields}"
        traceback = self._traceback(record)
        return f"{line}\n{traceback}" if traceback else line


class _Json(_Lines):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "message": record.getMessage()}
        more = self._of(record) | {"logger": record.name, "traceback": self._traceback(record)}
        return json.dumps(line | {name: value for name, value in more.items() if value is not None}, default=str)
