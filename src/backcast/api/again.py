"""Again: the input that a run was submitted with, and a new run that repeats an ended one."""

from uuid import UUID

from fastapi import APIRouter, Request, Response

from backcast.api import objects, problems
from backcast.api.body import optional_body, parse_json, validate
from backcast.api.deps import Backend, Deps
from backcast.api.routing import Route
from backcast.api.runs import ENDED, IDEMPOTENCY_KEY, PREFER, SUBMIT_PROBLEMS, accepted, json_request
from backcast.api.submit import idempotency_key, submit
from backcast.errors import (
    InputGone,
    InvalidInput,
    LedgerUnavailable,
    MalformedBody,
    NotFinished,
    StoreUnavailable,
    UnknownRun,
    UnknownTask,
)
from backcast.ledger import runs
from backcast.ledger.runs import Value
from backcast.models import JSON, Changes, Run, Submission

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["runs"], route_class=Route)


@router.get(
    "/input",
    summary="Get the input of a run",
    response_model=None,
    responses={
        200: {"description": "The input, a JSON object", "content": {"application/json": {"schema": {}}}},
        307: objects.REDIRECT,
        **problems.responses(UnknownRun, InputGone, LedgerUnavailable, StoreUnavailable),
    },
)
async def get_input(run_id: UUID, deps: Deps) -> Response:
    found = await runs.kept_input(deps.ledger, run_id)
    if found.text is not None:
        return Response(found.text, media_type="application/json")
    assert found.key is not None
    return await objects.response(deps.store, found.key, _gone())


def _gone() -> InputGone:
    return InputGone("The input was large, and its object is no longer in the store: send the input again.")


@router.post(
    "/retry",
    status_code=202,
    summary="Repeat a run that has ended",
    description=(
        "Makes a new run of the same owner with the kept input, or with what the body changes, and answers as a"
        " submission does; the ended run stays as it is, and lists the new one in `retried_by`. The input is checked"
        " against the task as it is now. The new run is in no batch; `POST /v1/batches/{batch_id}/retry` repeats those"
        " of a batch. A run that has not ended is not repeated: cancel it, or wait."
    ),
    response_model=Run,
    responses=ENDED | problems.responses(UnknownRun, UnknownTask, NotFinished, InputGone) | SUBMIT_PROBLEMS,
    openapi_extra={"parameters": [IDEMPOTENCY_KEY, PREFER], **json_request(Changes, required=False)},
)
async def retry_run(run_id: UUID, request: Request, deps: Deps) -> Response:
    changes = validate(Changes, await optional_body(request)).model_dump(exclude_none=True)
    found = await runs.kept_input(deps.ledger, run_id)
    run = found.run
    if not run.state.is_final:
        raise NotFinished(f"The run is {run.state.value}: cancel it, or wait for its end, and repeat it then.")
    task = changes.pop("task", run.task)
    kept: dict[str, JSON] = {"owner": run.owner, "priority": run.priority, "metadata": run.metadata}
    if task == run.task:
        kept["lane"] = run.lane
    if "input" not in changes:
        kept["input"] = await _kept_input(deps, found)
    submission = validate(Submission, kept | changes)
    return await accepted(request, await submit(deps, task, submission, key=idempotency_key(request), retry_of=run.id))


async def _kept_input(deps: Backend, found: Value) -> JSON:
    """A large one is in memory here, as it was at its submission: it is checked, and stored under the new run's key."""
    text = found.text
    if text is None:
        assert found.key is not None
        text = await objects.taken(deps.store.get, found.key, _gone())
    try:
        return parse_json(text)
    except MalformedBody:
        raise InvalidInput("The kept input is damaged: send the whole `input` in the body.") from None
