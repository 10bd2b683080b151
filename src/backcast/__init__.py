"""Background tasks you can rely on: cast messy data into a wanted shape, or run any Prefect task, in the background."""

from backcast.options import cancel_requested, options
from backcast.reporting import emit, progress

__all__ = ["cancel_requested", "emit", "options", "progress"]
__version__ = "0.1.0"
