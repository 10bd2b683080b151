"""The HTTP server: uvicorn, with deadlines for the head and the body of a request and for a part of its answer, so that
no client can hold a connection by sending slowly or by taking nothing, with a stop that answers the requests that wait
for a run, and with bodies also for the clients that offer another protocol.
"""

import asyncio
import contextlib
import fcntl
import json
import socket
import sys
import termios
import time
from typing import Any, Literal

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from backcast.api import problems
from backcast.errors import ClientError, HeadTooLarge, MalformedRequest, RequestTooSlow
from backcast.settings import Api

LARGEST_HEAD = 64 * 1024
"""Bytes of request line and headers; httptools itself has no limit."""
SLOWEST = 16 * 1024
"""Bytes of a body that earn a further second."""
STUCK = 60.0
"""Seconds in which a reader has to take a part of what waits for it."""


class Server(uvicorn.Server):
    """Serves while `beside` is entered, which serves the probes and metrics of this process."""

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, beside: contextlib.AbstractAsyncContextManager[Any]
    ) -> None:
        super().__init__(config)
        self._app, self._beside = app, beside

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with self._beside:
            if sockets is None and self.config.host == "::":
                sockets = [self.config.bind_socket()]  # one that asyncio makes for this address refuses IPv4
            await super().serve(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.backend.stop()
        await super().shutdown(sockets)


class _Flow(FlowControl):
    """Counts the seconds in which we do not read."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._began, self._before = 0.0, 0.0

    @property
    def paused(self) -> float:
        return self._before + (time.monotonic() - self._began if self.read_paused else 0.0)

    def pause_reading(self) -> None:
        if not self.read_paused:
            self._began = time.monotonic()
        super().pause_reading()

    def resume_reading(self) -> None:
        self._before = self.paused
        super().resume_reading()


def protocol(limits: Api, slowest: int = SLOWEST, stuck: float = STUCK) -> type[asyncio.Protocol]:
    """uvicorn's protocol with these deadlines; `slowest`: bytes a second. A request in one piece costs no timer."""
    head_timeout, body_timeout = limits.header_timeout.total_seconds(), limits.body_timeout.total_seconds()

    class Protocol(HttpToolsProtocol):
        _part: Literal["head", "body"] | None = None
        """The part of a request that has begun to arrive and is not complete."""
        _flow: _Flow
        _began = 0.0
        _received = 0
        _deadline: asyncio.TimerHandle | None = None
        _data = b""
        """What came last."""
        _unread = 0
        """Bytes that waited for the reader at the last look, to which none can have been added since."""
        _reading: asyncio.TimerHandle

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.flow = self._flow = _Flow(transport)
            self._socket = transport.get_extra_info("socket")
            self._deadline = self.loop.call_later(self.timeout_keep_alive, self.transport.close)
            self._reading = self.loop.call_later(stuck, self._check_reader)

        def connection_lost(self, exc: Exception | None) -> None:
            self._begin(None)
            self._reading.cancel()
            super().connection_lost(exc)

        def resume_writing(self) -> None:
            self._unread = 0
            super().resume_writing()

        def _check_reader(self) -> None:
            is_fixed = self._flow.write_paused or self.transport.is_closing()
            unread = self.transport.get_write_buffer_size() + self._sent() if is_fixed else 0
            if 0 < self._unread <= unread:
                self.transport.abort()
            self._unread = unread
            self._reading = self.loop.call_later(stuck, self._check_reader)

        def _sent(self) -> int:
            """Bytes that the system has taken for the reader, who has not: its buffer empties a megabyte at a time."""
            with contextlib.suppress(OSError, ValueError):  # it is closed
                return int.from_bytes(fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
            return 0

        def data_received(self, data: bytes) -> None:
            if self._part is None and self._is_idle():
                self._begin("head")
            self._data = data
            super().data_received(data)
            if self._part is None:
                return
            self._received += len(data)
            if self._part == "head" and self._received > LARGEST_HEAD:
                self._refuse(HeadTooLarge(f"Request line and headers may have {LARGEST_HEAD} bytes: send less."))
            elif self._deadline is None:
                self._deadline = self.loop.call_later(self._left(), self._check)

        def on_message_begin(self) -> None:
            self._begin("head")
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            if self.parser.should_upgrade():
                return  # `_unsupported_upgrade_warning` comes next
            self._begin("body")
            self.scope["abort"] = self._abort  # pyright: ignore[reportGeneralTypeIssues]  # for endless answers
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            if not self.parser.should_upgrade():
                self._begin(None)
                super().on_message_complete()

        def _unsupported_upgrade_warning(self) -> None:
            """Serve a request that offers another protocol in this one, as it allows. Java's client offers HTTP/2 with
            each request. httptools leaves out the body of such a request, so its head is read again without the offer.
            """
            upgrade = sys.exception()
            assert isinstance(upgrade, httptools.HttpParserUpgrade)
            version, method = self.parser.get_http_version().encode(), self.parser.get_method()
            if method == b"CONNECT":
                self._refuse(MalformedRequest("This is no proxy: send requests for its own paths."))
                return
            head = [method, b" ", self.url, b" HTTP/", version, b"\r\n"]
            for name, value in self.headers:
                head += [name, b": ", value, b"\r\n"] if name != b"upgrade" else []
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self._data = b"".join([*head, b"\r\n", self._data[upgrade.args[0] :]])
            super().data_received(self._data)

        def _abort(self) -> None:
            """Close the connection, whatever of the answer has not been sent."""
            self.cycle.disconnected = True
            self.transport.abort()

        def _begin(self, part: Literal["head", "body"] | None) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            self._part, self._received, self._deadline = part, 0, None
            if part is not None:
                self._began = self._client_time()

        def _client_time(self) -> float:
            """Seconds, without those in which the client could not send because we did not read."""
            return self.loop.time() - self._flow.paused

        def _is_idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

        def _left(self) -> float:
            allowed = head_timeout if self._part == "head" else body_timeout + self._received / slowest
            return self._began + allowed - self._client_time()

        def _check(self) -> None:
            if self._part == "head" and not self._is_idle():
                self._began = self._client_time()  # the next request may come slowly while the one before is answered
            if (left := self._left()) > 0:
                self._deadline = self.loop.call_later(max(left, 0.05), self._check)  # the time left may stand still
            else:
                allowed = f"{head_timeout:g} s" if self._part == "head" else f"{body_timeout:g} s, and 1 s per 16 KiB,"
                self._refuse(RequestTooSlow(f"The {self._part} of a request has {allowed} to arrive: send it again."))

        def send_400_response(self, msg: str) -> None:
            self._refuse(MalformedRequest(msg))

        def _refuse(self, error: ClientError) -> None:
            """Answer, unless an answer has begun, and close."""
            part = self._part
            self._begin(None)
            is_first = self.cycle is None  # pyright: ignore[reportUnnecessaryComparison]
            if is_first or (self._is_idle() if part == "head" else not self.cycle.response_started):
                self.transport.write(_raw(error))
            if not self._is_idle():
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

    return Protocol


def _raw(error: ClientError) -> bytes:
    """The problem document as a whole answer."""
    body = json.dumps(problems.document(error.status, error.code, error.title, error.detail)).encode()
    head = f"HTTP/1.1 {error.status} {error.title}\r\ncontent-type: {problems.MEDIA_TYPE}\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def config(app: FastAPI, limits: Api, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(app, http=protocol(limits), ws="none", **more)
