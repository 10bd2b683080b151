"""The command line, with all its commands: their order here is the order in the help."""

from backcast.cli import processes, runs, batches, tasks, lanes, levers  # noqa: I001  # the order in the help
from backcast.cli.app import app

__all__ = ["app", "batches", "lanes", "levers", "processes", "runs", "tasks"]
