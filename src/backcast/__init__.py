"""Background tasks you can rely on: cast messy data into a wanted shape, or run any Prefect task, in the background."""

__version__ = "0.1.0"
