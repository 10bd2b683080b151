"""Sets up the log of a process."""

import logging
import sys


def configure_logging(level: str) -> None:
    """Log one line per event to stderr, without colours or prefixes: the program that shows the lines adds them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(levelname)-7s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("backcast").setLevel(level.upper())


class _Lines(logging.Formatter):
    """Names the run in the lines that Prefect's loggers write for one; they keep it beside the message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        run = getattr(record, "task_run_id", None)
        if run is not None:
            record.message = f"run {run} of {getattr(record, 'task_name', None)}: {record.message}"
        return super().formatMessage(record)
