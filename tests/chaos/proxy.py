"""Makes the link between one process and one server slow, cut, or open and silent. Knows no protocol."""

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass, field

CHUNK = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # linger for no time: closing sends RST


@dataclass(frozen=True)
class Weather:
    """The condition of a link."""

    cut: bool = False
    """Live connections are reset, new ones too."""
    hang: bool = False
    """Connections are accepted and stay, and nothing goes through: the worst case, because no error appears."""
    latency: float = 0.0
    """Seconds for each piece of data, each way."""
    jitter: float = 0.0
    """Seconds more, at most."""
    rate: float = float("inf")
    """Bytes per second."""


CLEAR = Weather()


@dataclass(eq=False)
class Link:
    """Listens on a loopback port and forwards to `target`: a port of loopback, or the path of a unix socket."""

    target: int | str
    port: int = 0
    weather: Weather = CLEAR
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _ends: set[asyncio.StreamWriter] = field(default_factory=set)
    _server: asyncio.Server | None = None

    async def open(self) -> "Link":
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def become(self, weather: Weather) -> None:
        self.weather = weather
        if weather.cut:
            self._reset_all()
        self._changed.set()
        self._changed = asyncio.Event()

    async def aclose(self) -> None:
        assert self._server is not None
        self._server.close()
        self.become(Weather(cut=True))
        await asyncio.sleep(0)

    def _reset_all(self) -> None:
        for end in self._ends:
            _reset(end)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        self._ends |= ends
        try:
            with contextlib.suppress(OSError):
                await self._pass(0)
                to_reader, to_writer = await self._reach()
                ends.add(to_writer)
                self._ends |= ends
                ways = [asyncio.create_task(self._pump(*way)) for way in ((reader, to_writer), (to_reader, writer))]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self._ends -= ends
            for end in ends:
                end.close()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self.target, str):
            return await asyncio.open_unix_connection(self.target)
        return await asyncio.open_connection("127.0.0.1", self.target)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            await self._pass(len(data))
            writer.write(data)
            await writer.drain()

    async def _pass(self, size: int) -> None:
        """Delay the data by the weather; data sent while the link hung arrives afterwards, as on a real link."""
        while self.weather.hang:
            await self._changed.wait()
        if self.weather.cut:
            raise ConnectionResetError
        if self.weather is not CLEAR:
            late = self.weather.latency + random.uniform(0, self.weather.jitter)
            await asyncio.sleep(late + size / self.weather.rate)


def _reset(end: asyncio.StreamWriter) -> None:
    if (raw := end.get_extra_info("socket")) is not None and raw.family == socket.AF_INET:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.transport.abort()
