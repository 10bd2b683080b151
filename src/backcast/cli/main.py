"""The command line, with all its commands: their order here is the order in the help."""

from backcast.cli import lanes, processes, runs, tasks
from backcast.cli.app import app

__all__ = ["app", "lanes", "processes", "runs", "tasks"]
