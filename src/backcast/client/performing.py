"""Performs exchanges with the service, blocking or on an event loop; and makes a method of both kinds of client of one
exchange."""

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from typing import Any, Never, ParamSpec, Protocol, Self, TypeVar, cast, get_args, overload

import httpx

from backcast.client.wire import Ask, Flow, connection, patiently, to_httpx
from backcast.errors import refuse_unknown

DEFAULT_URL = "http://127.0.0.1:8000"

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Blocking:
    """The service at `url`. `headers` go with every request; `patience` is in seconds."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        headers: Mapping[str, str] | None = None,
        patience: float = 10.0,
        **unknown: Never,
    ) -> None:
        refuse_unknown(type(self).__name__, unknown, ("headers", "patience"))
        self._patience = patience
        self._http = httpx.Client(**connection(url, headers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _perform(self, flow: Flow[T]) -> T:
        steps, got = patiently(flow, self._patience), None
        try:
            while True:
                step = steps.send(got)
                if isinstance(step, Ask):
                    try:
                        got = self._http.request(**to_httpx(step))
                    except httpx.TransportError as error:
                        got = error
                else:
                    got = time.sleep(step)
        except StopIteration as end:
            return end.value


class Awaiting:
    """As `Blocking`, for asyncio."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        headers: Mapping[str, str] | None = None,
        patience: float = 10.0,
        transport: httpx.AsyncBaseTransport | None = None,
        **unknown: Never,
    ) -> None:
        refuse_unknown(type(self).__name__, unknown, ("headers", "patience", "transport"))
        self._patience = patience
        way: Any = connection(url, headers) if transport is None else {"base_url": url, "headers": headers}
        self._http = httpx.AsyncClient(**way, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _perform(self, flow: Flow[T]) -> T:
        steps, got = patiently(flow, self._patience), None
        try:
            while True:
                step = steps.send(got)
                if isinstance(step, Ask):
                    try:
                        got = await self._http.request(**to_httpx(step))
                    except httpx.TransportError as error:
                        got = error
                else:
                    got = await asyncio.sleep(step)
        except StopIteration as end:
            return end.value


class Method(Protocol[P, T_co]):
    """A method that blocks in one kind of client, and is awaited in the other."""

    @overload
    def __get__(self, client: Blocking, kind: type) -> Callable[P, T_co]: ...
    @overload
    def __get__(self, client: Awaiting, kind: type) -> Callable[P, Coroutine[Any, Any, T_co]]: ...


def method(flow: Callable[P, Flow[T]]) -> Method[P, T]:
    """A method of both kinds of client that performs this exchange."""

    @wraps(flow)
    def perform(client: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        return client._perform(flow(*args, **kwargs))

    signature = inspect.signature(flow)
    client = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    *_, returned = get_args(signature.return_annotation)
    vars(perform)["__signature__"] = signature.replace(
        parameters=[client, *signature.parameters.values()], return_annotation=returned
    )
    return cast("Method[P, T]", perform)
