"""Many runs at once: how many match first, then the operation as the steward works through it."""

from typing import Any, Literal
from uuid import uuid4

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from backcast.console.pages import read_form, render, service
from backcast.console.runs import filters, given
from backcast.errors import InvalidInput

_ENDED = ("completed", "failed", "cancelled", "expired")


def _kind(request: Request) -> Literal["retry", "cancel"]:
    match request.path_params["kind"]:
        case "retry" | "cancel" as kind:
            return kind
        case _:
            raise HTTPException(404)


def _chosen(kind: str, chosen: dict[str, str]) -> Any:
    """Without a state that the operation can't have: it then takes its own."""
    wanted: Any = filters(chosen)
    if (wanted.get("state") in _ENDED) != (kind == "retry"):
        wanted.pop("state", None)
    return wanted


async def _count(request: Request) -> Response:
    client, kind = service(request).client, _kind(request)
    chosen = given(request.query_params)
    wanted = _chosen(kind, chosen)
    if not wanted:
        wanted["state"] = "failed" if kind == "retry" else "queued"
        chosen["state"] = wanted["state"]
    count = client.count_to_retry if kind == "retry" else client.count_to_cancel
    return render(request, "many.html", kind=kind, chosen=chosen, matched=await count(**wanted), key=uuid4().hex)


async def _do(request: Request) -> Response:
    client, kind = service(request).client, _kind(request)
    form = await read_form(request)
    wanted = _chosen(kind, given(form))
    if not wanted:
        raise InvalidInput("Choose runs by a filter first.")
    do = client.retry_many if kind == "retry" else client.cancel_many
    operation = await do(key=str(form.get("key")), **wanted)
    return RedirectResponse(f"/console/operations/{operation.id}", 303)


async def _operation(request: Request) -> Response:
    operation = await service(request).client.operation(request.path_params["operation_id"])
    return render(request, "operation.html", operation=operation)


async def _stop(request: Request) -> Response:
    operation = await service(request).client.stop_operation(request.path_params["operation_id"])
    return RedirectResponse(f"/console/operations/{operation.id}", 303)


routes = [
    Route("/many/{kind}", _count),
    Route("/many/{kind}", _do, methods=["POST"]),
    Route("/operations/{operation_id:uuid}", _operation),
    Route("/operations/{operation_id:uuid}/stop", _stop, methods=["POST"]),
]
