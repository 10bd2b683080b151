"""Routes for which FastAPI is only the documentation. Their endpoints take the request and answer it: FastAPI solves no
dependencies and checks no response, which costs more than all the rest of a small request.
"""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from backcast import names
from backcast.api.routing import Route
from backcast.errors import UnknownRun


class FastRoute(Route):
    def __init__(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], **declared: Any) -> None:
        super().__init__(path, endpoint, **declared)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = answer


def in_path(name: str, **schema: Any) -> dict[str, Any]:
    """For the declaration of a fast route: a parameter in its path."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", **schema}}


def in_header(name: str, description: str) -> dict[str, Any]:
    """For the declaration of a fast route: a header that it reads."""
    return {"name": name, "in": "header", "required": False, "description": description, "schema": {"type": "string"}}


RUN_ID = in_path("run_id", format="uuid")
NAME = in_path("name", **names.SCHEMA)


def run_id(request: Request) -> UUID:
    """Raises `UnknownRun`."""
    try:
        return UUID(request.path_params["run_id"])
    except ValueError:
        raise UnknownRun("A run id is a UUID: use the one that the submission returned.") from None
