"""Reads request bodies, under a limit that holds before anything is buffered; errors name the wrong field."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from jiter import from_json
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backcast.errors import BodyTooLarge, FieldError, InvalidInput, MalformedBody, UnsupportedBody
from backcast.models import JSON

Model = TypeVar("Model", bound=BaseModel)


class LimitBody:
    """Middleware that refuses a body of more than `limit` bytes: by its announced length, or once it is exceeded.
    `longer` gives the limits of paths that take more."""

    def __init__(self, app: ASGIApp, limit: int, longer: Mapping[str, int]) -> None:
        self._app, self._limit, self._longer = app, limit, longer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        limit = self._longer.get(scope["path"], self._limit)
        received = 0

        def too_large() -> BodyTooLarge:
            return BodyTooLarge(f"A body may have {limit} bytes here: send less, or send a link to the data instead.")

        async def limited() -> Message:
            nonlocal received
            if announced.isdigit() and int(announced.lstrip(b"0")[:20] or b"0") > limit:  # int() takes 4,300 digits
                raise too_large()
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large()
            return message

        return await self._app(scope, limited, send)


async def json_body(request: Request) -> JSON:
    """The body as JSON. Raises `MalformedBody` or `UnsupportedBody`."""
    kind = media_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedBody(
            f"The body is {kind or 'of no stated type'}: send JSON, with `Content-Type: application/json`."
        )
    return parse_json(await request.body())


async def optional_body(request: Request) -> JSON:
    """As `json_body`; a request without a body counts as an empty object."""
    return await json_body(request) if await request.body() else {}


def media_type(request: Request) -> str:
    """The stated type of the body, or "". Raises `UnsupportedBody`: it is compressed."""
    if encoding := request.headers.get("content-encoding", "identity").strip().removeprefix("identity"):
        raise UnsupportedBody(f"The body has `Content-Encoding: {encoding}`: send it as it is, without that header.")
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(text: bytes | str) -> JSON:
    """Strict JSON: no NaN, no lone surrogates, no key twice in an object, bounded nesting and number length. Raises
    `MalformedBody`."""
    try:
        return from_json(
            text if isinstance(text, bytes) else text.encode(), allow_inf_nan=False, catch_duplicate_keys=True
        )
    except ValueError as error:
        raise MalformedBody(f"The body is not JSON that can be used: {error}.") from None


JSONBody = Annotated[Any, Depends(json_body)]


def validate(model: type[Model], body: JSON) -> Model:
    """Raises `InvalidInput` that names every wrong field."""
    if not isinstance(body, dict):
        raise InvalidInput("The body must be a JSON object.", errors=(FieldError("", "not an object"),))
    try:
        return model.model_validate(body)
    except ValidationError as error:
        fields = tuple(
            FieldError("".join(f"/{part}" for part in field["loc"]), field["msg"])
            for field in error.errors(include_url=False, include_input=False, include_context=False)
        )
        raise InvalidInput(f"{fields[0].pointer}: {fields[0].detail}.", errors=fields) from None
