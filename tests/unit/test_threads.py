"""The threads of functions, in a process that can have no more of them."""

import asyncio
import threading

import pytest

from backcast.executor.threads import Threads


async def test_all_threads_are_there_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(2)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", refuse)
        together = threading.Barrier(2)
        await asyncio.gather(*(threads.run(together.wait, asked=threading.Event()) for _ in range(2)))
    threads.close()
