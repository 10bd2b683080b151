"""Carries messages between two processes over a socket, in frames: what is sent in one turn of the loop makes one, or
a few.

Decides the bytes on the wire, and how many a peer may make us keep: no pickle, and nothing of what a message means.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

_LENGTH = struct.Struct("<I")
_HEAD = struct.Struct("<B16siII")
_NOBODY = bytes(16)
_FRAME = 1 << 20
"""Bytes of body after which the next message begins another frame."""


class Message(NamedTuple):
    kind: int
    id: bytes = _NOBODY
    """16 bytes: of a run, or of a request that is answered under the same id."""
    number: int = 0
    meta: bytes = b""
    body: bytes = b""


def packed(messages: Iterable[Message]) -> bytes:
    """A frame: its length in 4 bytes, then each message's head, meta and body."""
    parts = [b""]
    for kind, name, number, meta, body in messages:
        parts += (_HEAD.pack(kind, name, number, len(meta), len(body)), meta, body)
    parts[0] = _LENGTH.pack(sum(map(len, parts)))
    return b"".join(parts)


def _unpacked(frame: bytes) -> list[Message]:
    messages: list[Message] = []
    at = 0
    while at < len(frame):
        kind, name, number, meta, body = _HEAD.unpack_from(frame, at)
        at += _HEAD.size
        messages.append(Message(kind, name, number, frame[at : at + meta], frame[at + meta : at + meta + body]))
        at += meta + body
    return messages


class Channel(asyncio.Protocol):
    """One end of the socket. `received` is called with each message; `lost` is set when the other end is gone."""

    def __init__(self, received: Callable[[Message], None], *, largest: int) -> None:
        """A longer message than `largest` bytes ends the connection."""
        self._received, self._longest = received, largest + 2 * _FRAME
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._waiting = list[Message]()
        self._transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()

    @classmethod
    async def over(
        cls, end: socket.socket, received: Callable[[Message], None], *, largest: int = 1 << 32
    ) -> "Channel":
        end.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(lambda: cls(received, largest=largest), sock=end)
        return channel

    def send(self, message: Message) -> None:
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(message)

    def close(self) -> None:
        """Send what is left, and end the connection."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def _flush(self) -> None:
        messages, self._waiting = self._waiting, []
        frame, size = list[Message](), 0
        try:
            for message in messages:
                frame.append(message)
                size += len(message.body)
                if size > _FRAME:
                    self._write(frame)
                    frame, size = [], 0
            self._write(frame)
        except BaseException:  # messages are lost, and the other end may wait for one of them
            if self._transport is not None:
                self._transport.abort()
            raise

    def _write(self, frame: list[Message]) -> None:
        if frame and self._transport is not None:
            self._transport.write(packed(frame))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop has classes of its own

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        at = 0
        while len(self._buffer) >= at + 4:
            length = _LENGTH.unpack_from(self._buffer, at)[0]
            end = at + 4 + length
            if length > self._longest and self._transport is not None:
                self._transport.abort()
                return
            if len(self._buffer) < end:
                break
            for message in _unpacked(bytes(memoryview(self._buffer)[at + 4 : end])):
                self._received(message)
            at = end
        if at:
            del self._buffer[:at]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._transport = None
        self.lost.set()


def receive(end: socket.socket) -> list[Message]:
    """The messages of the next frame, before there is a loop. Raises `EOFError`."""
    return _unpacked(_exactly(end, _LENGTH.unpack(_exactly(end, _LENGTH.size))[0]))


def _exactly(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (piece := end.recv(count - len(data))):
            raise EOFError
        data += piece
    return data
