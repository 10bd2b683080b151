"""Background tasks you can rely on: cast messy data into a wanted shape, or run any Prefect task, in the background."""

from backcast.options import cancel_requested, options

__all__ = ["cancel_requested", "options"]
__version__ = "0.1.0"
