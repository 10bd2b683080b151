"""Batches: runs that were submitted together, with what has become of them."""

from uuid import UUID

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from backcast.console.pages import render, service
from backcast.errors import InvalidInput
from backcast.models import State


async def _list(request: Request) -> Response:
    if text := request.query_params.get("id", "").strip():
        try:
            return RedirectResponse(f"/console/batches/{UUID(text)}", 303)
        except ValueError:
            raise InvalidInput("The id of a batch is a UUID: use the one that the submission returned.") from None
    return render(request, "batches.html", batches=await service(request).client.latest_batches())


async def _one(request: Request) -> Response:
    batch = await service(request).client.batch(request.path_params["batch_id"])
    return render(request, "batch.html", batch=batch, states=[*State])


async def _cancel(request: Request) -> Response:
    batch = await service(request).client.cancel_batch(request.path_params["batch_id"])
    return RedirectResponse(f"/console/batches/{batch.id}", 303)


async def _retry(request: Request) -> Response:
    operation = await service(request).client.retry_batch(request.path_params["batch_id"])
    return RedirectResponse(f"/console/operations/{operation.id}", 303)


def _part(name: str) -> Route:
    async def answer(request: Request) -> Response:
        batch_id: UUID = request.path_params["batch_id"]
        return service(request).answer(f"/v1/batches/{batch_id}/{name}")

    return Route(f"/batches/{{batch_id:uuid}}/{name}", answer)


routes = [
    Route("/batches", _list),
    Route("/batches/{batch_id:uuid}", _one),
    Route("/batches/{batch_id:uuid}/cancel", _cancel, methods=["POST"]),
    Route("/batches/{batch_id:uuid}/retry", _retry, methods=["POST"]),
    *map(_part, ("results", "errors")),
]
