"""Follows the events of a run or a batch over a stream of the service: decides where to go on, and when to give up."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import httpx

from backcast.client.wire import Ask, foreign, path, refusal, silence
from backcast.errors import Unavailable
from backcast.models import JSON
from backcast.process.outages import backoff

_STREAM = "text/event-stream"
_SILENCE = 60.0
"""Seconds: the service sends a comment every 15 s."""
_FOREVER = 120.0
"""Seconds without a connection after which the reader is given the error."""


@dataclass(frozen=True, slots=True)
class Event:
    """What has happened: `name` is `queued`, `started`, `progress`, `output`, `retrying`, `log`, `ended` …, as in the
    HTTP interface."""

    name: str
    data: JSON


class Following:
    """The state of one reader. Each state of a run is given once, and in order, however often the connection is lost.

    Raises (any method): the error of the problem document, or `Unavailable` after two minutes without a connection, or
    `ConfigurationError` if what answers is not backcast.
    """

    def __init__(self, noun: str, which: UUID | str, *, logs: bool = False) -> None:
        self._url = path(noun, which, "/events")
        self._params = {"logs": "true"} if logs else {}
        self._last: str | None = None
        self._delays: Iterator[float] = backoff(0.1, 5.0)
        self._connected = time.monotonic()
        self._id, self._name, self._data = "", "", list[str]()
        self.is_over = False
        self.pause = 0.2
        """Seconds before the next connection after one that the service has ended; it may send another number."""

    def ask(self) -> Ask:
        headers = {"Accept": _STREAM} | ({"Last-Event-ID": self._last} if self._last is not None else {})
        return Ask("GET", self._url, self._params, headers=headers, timeout=_SILENCE)

    def opened(self, answer: httpx.Response) -> None:
        """Called with an answer whose body, unless it is a stream, has been read."""
        if answer.status_code == 204:
            self.is_over = True
        elif answer.status_code != 200:
            raise refusal(answer)
        elif not answer.headers.get("Content-Type", "").startswith(_STREAM):
            raise foreign(answer, "no stream of events")
        self._connected, self._delays = time.monotonic(), backoff(0.1, 5.0)
        self._id, self._name, self._data = "", "", []

    def line(self, text: str) -> Event | None:
        """The event that ends with this line, if one does."""
        if text:
            field, _, value = text.partition(":")
            value = value.removeprefix(" ")
            match field:
                case "id":
                    self._id = value
                case "event":
                    self._name = value
                case "data":
                    self._data.append(value)
                case "retry" if value.isdecimal():
                    self.pause = int(value) / 1000
                case _:
                    pass
            return None
        if not self._data:
            return None
        event, self._last = Event(self._name, json.loads("\n".join(self._data))), self._id
        self._id, self._name, self._data = "", "", []
        self.is_over = event.name == "ended"
        return event

    def lost(self, error: httpx.TransportError | Unavailable) -> float:
        """Seconds to wait before the next connection."""
        if time.monotonic() - self._connected > _FOREVER:
            raise silence(error) if isinstance(error, httpx.TransportError) else error
        return next(self._delays)
