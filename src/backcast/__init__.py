"""Background tasks you can rely on: cast messy data into a wanted shape, or run any Prefect task, in the background."""

from typing import TYPE_CHECKING, Any

from backcast.options import cancel_requested, options
from backcast.reporting import emit, progress

if TYPE_CHECKING:
    from backcast.client import AsyncClient, Client
    from backcast.client.delay import delay, delay_async

__all__ = ["AsyncClient", "Client", "cancel_requested", "delay", "delay_async", "emit", "options", "progress"]
__version__ = "0.1.0"

_CLIENT = {"AsyncClient": "client", "Client": "client", "delay": "client.delay", "delay_async": "client.delay"}


def __getattr__(name: str) -> Any:
    """The client's libraries are imported when somebody uses it: a process of the service does not."""
    if name not in _CLIENT:
        raise AttributeError(f"module 'backcast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"backcast.{_CLIENT[name]}"), name)
