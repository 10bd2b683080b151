"""The command line, with all its commands: their order here is the order in the help."""

from backcast.cli import processes, runs, looks, batches, tasks, counts, lanes, levers  # noqa: I001  # the order in the help
from backcast.cli.app import app

__all__ = ["app", "batches", "counts", "lanes", "levers", "looks", "processes", "runs", "tasks"]
