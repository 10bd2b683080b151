"""The one way to wait in tests: until something holds, with a deadline, and with the last thing seen in the message."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

Seen = TypeVar("Seen")

PATIENCE = 120.0
"""Seconds: far away, as no machine is to be so slow that a wait ends in vain where something was only late."""


async def until(
    look: Callable[[], Awaitable[Seen]],
    holds: Callable[[Seen], bool] = bool,
    *,
    timeout: float = PATIENCE,
    every: float = 0.05,
) -> Seen:
    """Look again and again; returns what was seen once it holds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            seen: object = await look()
            if holds(seen):  # type: ignore[arg-type]
                return seen  # type: ignore[return-value]
        except (AssertionError, OSError, httpx.HTTPError) as error:
            seen = error
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s in vain; last seen: {seen!r}")
        await asyncio.sleep(every)
