"""The only wait in tests: until a condition holds. After the deadline the error shows the last value seen."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

Seen = TypeVar("Seen")

PATIENCE = 120.0
"""Seconds: far longer than the slowest machine needs, so that a late result does not fail a test."""


async def until(
    look: Callable[[], Awaitable[Seen]],
    holds: Callable[[Seen], bool] = bool,
    *,
    timeout: float = PATIENCE,
    every: float = 0.05,
) -> Seen:
    """Look again and again; returns the first value that holds."""
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
