"""Operations: one request to repeat or cancel many runs, which the steward carries out; and how far each has come."""

from uuid import UUID

from fastapi import APIRouter, Request, Response

from backcast.api import problems
from backcast.api.body import json_body, validate
from backcast.api.deps import Backend, Deps
from backcast.api.routing import Route
from backcast.api.runs import IDEMPOTENCY_KEY, json_request
from backcast.api.submit import idempotency_key
from backcast.errors import (
    FieldError,
    IdempotencyConflict,
    InvalidInput,
    LedgerUnavailable,
    MalformedBody,
    UnknownBatch,
    UnknownOperation,
    UnsupportedBody,
)
from backcast.ledger import batches, operations
from backcast.ledger.operations import Recorded
from backcast.ledger.selection import Kind
from backcast.models import CancelMany, Matched, Operation, RetryMany, Selection, uuid7

router = APIRouter(prefix="/v1", tags=["runs"], route_class=Route)

PROBLEMS = problems.responses(MalformedBody, UnsupportedBody, InvalidInput, IdempotencyConflict, LedgerUnavailable)
MATCHED = {200: {"model": Matched, "description": "Of a dry run: nothing is changed"}}
_BY_PAGES = (
    " Answers 202 with an operation, which the steward carries out in pages: ask for it again to see how far it has"
    " come, or stop it. With `dry_run` the runs are counted, and nothing is changed. An `Idempotency-Key` is one of"
    " the `owner` in the filters, or of no owner."
)


@router.post(
    "/runs/retry",
    status_code=202,
    summary="Repeat many runs that have ended",
    description=(
        "For the runs that match every given filter, and have ended before this request: the failed and expired ones,"
        " unless `state` is given. Each new run is as one of a retry without changes, but its input is not checked"
        " again: it needs a worker whose version of the task accepts it, as if it had waited all the time. Limits on"
        " the number of waiting runs do not hold for them, but count them." + _BY_PAGES
    ),
    response_model=Operation,
    responses=MATCHED | PROBLEMS,
    openapi_extra={"parameters": [IDEMPOTENCY_KEY], **json_request(RetryMany)},
)
async def retry_runs(request: Request, deps: Deps) -> Response:
    return await _begin(request, deps, "retry", validate(RetryMany, await json_body(request)))


@router.post(
    "/runs/cancel",
    status_code=202,
    summary="Cancel many runs",
    description=(
        "For the runs that match every given filter, and were submitted before this request: queued ones never start,"
        " running ones are asked to stop." + _BY_PAGES
    ),
    response_model=Operation,
    responses=MATCHED | PROBLEMS,
    openapi_extra={"parameters": [IDEMPOTENCY_KEY], **json_request(CancelMany)},
)
async def cancel_runs(request: Request, deps: Deps) -> Response:
    return await _begin(request, deps, "cancel", validate(CancelMany, await json_body(request)))


async def _begin(request: Request, deps: Backend, kind: Kind, asked: RetryMany | CancelMany) -> Response:
    chosen = Selection.model_validate(asked.model_dump(exclude={"dry_run"}))
    if not chosen.model_dump(exclude_defaults=True):
        why = f"set at least one filter: {', '.join(name for name in type(asked).model_fields if name != 'dry_run')}"
        raise InvalidInput(f"The body would choose all runs: {why}.", errors=(FieldError("", why),))
    key = idempotency_key(request)
    if asked.dry_run:
        runs, more = await operations.matching(deps.ledger, kind, chosen)
        return Response(Matched(runs=runs, more=more).model_dump_json(), media_type="application/json")
    return _accepted(await operations.record(deps.ledger, kind, chosen, owner=chosen.owner or "", key=key))


def _accepted(recorded: Recorded) -> Response:
    headers = {"Location": f"/v1/operations/{recorded.operation.id}", "Retry-After": "1"}
    if not recorded.fresh:
        headers["Idempotent-Replayed"] = "true"
    return Response(recorded.operation.model_dump_json(), 202, headers, "application/json")


@router.post(
    "/batches/{batch_id}/retry",
    status_code=202,
    summary="Repeat the runs of a batch that did not succeed",
    description=(
        "For its failed and expired runs: not for cancelled ones, whose caller did not want them any more. It is as"
        " `POST /v1/runs/retry` with this `batch`, which also takes another `state` and a `dry_run`; but the new runs"
        " are a batch of their own, the operation's `batch_id`, in the order of the old ones. The old batch stays as it"
        " is. Answers 202 with the operation. An `Idempotency-Key` is one of the batch's owner."
    ),
    response_model=Operation,
    responses=problems.responses(UnknownBatch, InvalidInput, IdempotencyConflict, LedgerUnavailable),
    openapi_extra={"parameters": [IDEMPOTENCY_KEY]},
)
async def retry_batch(batch_id: UUID, request: Request, deps: Deps) -> Response:
    key, batch = idempotency_key(request), await batches.get(deps.ledger, batch_id)
    return _accepted(
        await operations.record(
            deps.ledger, "retry", Selection(batch=batch.id), owner=batch.owner, key=key, batch_id=uuid7()
        )
    )


@router.get(
    "/operations/{operation_id}",
    summary="See how far an operation has come",
    responses=problems.responses(UnknownOperation, LedgerUnavailable),
)
async def get_operation(operation_id: UUID, deps: Deps) -> Operation:
    return await operations.get(deps.ledger, operation_id)


@router.post(
    "/operations/{operation_id}/cancel",
    summary="Stop an operation",
    description="It goes no further; what it has done stays done. One that has ended stays as it is.",
    responses=problems.responses(UnknownOperation, LedgerUnavailable),
)
async def stop_operation(operation_id: UUID, deps: Deps) -> Operation:
    return await operations.stop(deps.ledger, operation_id)
