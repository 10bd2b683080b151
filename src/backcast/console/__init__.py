"""The console: pages over the API for people, at `/console`. It uses the API as every other client does, and has no
rules and no SQL of its own."""

from backcast.console.app import routes

__all__ = ["routes"]
