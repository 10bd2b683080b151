"""Messages between two processes: none is lost without an end of the connection."""

import asyncio
import socket

from backcast.process.channel import Channel, Message


async def test_what_can_not_be_sent_ends_the_connection() -> None:
    """Another message may be lost with it."""
    ours, theirs = socket.socketpair()
    received = list[Message]()
    channel, other = await Channel.over(ours, received.append), await Channel.over(theirs, received.append)
    channel.send(Message(1))
    channel.send(Message(256))
    async with asyncio.timeout(60):
        await other.lost.wait()
    assert received == []
