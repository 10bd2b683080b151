"""Answers with objects of the store: with a link where callers can reach the store themselves, else with a stream."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Response
from fastapi.responses import RedirectResponse, StreamingResponse

from backcast.errors import ClientError
from backcast.store import Missing, Store

T = TypeVar("T")

REDIRECT = {"description": "A large value: fetch it from the store itself, within five minutes"}


async def response(store: Store, key: str, gone: ClientError) -> Response:
    """Raises `gone` if there is no such object."""
    if (link := await taken(store.link, key, gone)) is not None:
        return RedirectResponse(link, headers={"Cache-Control": "no-store"})
    return StreamingResponse(await taken(store.stream, key, gone), media_type="application/json")


async def taken(take: Callable[[str], Awaitable[T]], key: str, gone: ClientError) -> T:
    """What `take`, a method of the store, returns for this key. Raises `gone` if there is no such object."""
    try:
        return await take(key)
    except Missing:
        raise gone from None
