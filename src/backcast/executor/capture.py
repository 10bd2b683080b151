"""Sends to the history sink the events and log lines that Prefect itself makes in this process. The events are those of
tasks that tasks call.
"""

import logging
import os
from typing import Any

from prefect.events.schemas.events import Event
from prefect.events.worker import EventsWorker, ProcessPoolForwardingEventsClient
from prefect.logging.handlers import APILogHandler, set_api_log_sink

from backcast.history.events import RESOURCE
from backcast.history.sink import Sink
from backcast.texts import storable


class Queue:
    """Takes the place of the queue to another process that Prefect's forwarding client expects."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def put(self, item: tuple[str, Event]) -> None:
        event = item[1]
        self._sink.keep_event(str(event.resource.id if event.event.startswith(RESOURCE) else event.id), event)


def install(sink: Sink) -> None:
    """Make the sink the destination of this process's Prefect events and logs. Prefect ignores any other client class.

    Our engine publishes its own runs; only the tasks that tasks call come this way. Their changes of state are taken
    before Prefect's own thread searches for related flows, of which there are none.
    """
    os.register_at_fork(after_in_child=lambda: setattr(sink, "is_enabled", False))
    queue = Queue(sink)
    EventsWorker.set_client_override(ProcessPoolForwardingEventsClient, event_queue=queue)
    set_api_log_sink(sink.keep_log)
    APILogHandler.format = _format
    worker = EventsWorker.instance()
    send: Any = worker.send

    def take(event: Event) -> None:
        queue.put(("event", event)) if event.event.startswith(RESOURCE) else send(event)

    worker.send = take  # pyright: ignore[reportAttributeAccessIssue]  # a method is replaced on purpose


def _format(self: logging.Handler, record: logging.LogRecord) -> str:
    """The line as text that JSON and PostgreSQL can hold: Prefect 3.9 loses any other."""
    return storable(logging.Handler.format(self, record))
