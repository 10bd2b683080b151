"""Takes what Prefect itself reports in this process, events of tasks that tasks call and log lines, to the sink."""

from typing import Any

from prefect.events.schemas.events import Event
from prefect.events.worker import EventsWorker, ProcessPoolForwardingEventsClient
from prefect.logging.handlers import set_api_log_sink

from backcast.history.events import RESOURCE
from backcast.history.sink import Sink


class Queue:
    """What Prefect's forwarding client takes for a queue to another process."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def put(self, item: tuple[str, Event]) -> None:
        event = item[1]
        self._sink.keep_event(str(event.resource.id if event.event.startswith(RESOURCE) else event.id), event)


def install(sink: Sink) -> None:
    """Make the sink the destination of this process's Prefect events and logs. Prefect ignores any other client class.

    Our engine shows its runs itself; what comes this way are the tasks that tasks call. Their changes of state are
    taken before Prefect's own thread looks for related flows, of which there are none.
    """
    queue = Queue(sink)
    EventsWorker.set_client_override(ProcessPoolForwardingEventsClient, event_queue=queue)
    set_api_log_sink(sink.keep_log)
    worker = EventsWorker.instance()
    send: Any = worker.send

    def take(event: Event) -> None:
        queue.put(("event", event)) if event.event.startswith(RESOURCE) else send(event)

    worker.send = take  # pyright: ignore[reportAttributeAccessIssue]  # a method is replaced on purpose
