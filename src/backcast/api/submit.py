"""Accepts a run: checks the input against the task's schema, then records it. The 202 is sent after the commit."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from uuid import UUID

from fastapi import Request

from backcast import targets
from backcast.api.deps import Backend, Known, Version
from backcast.errors import FieldError, InvalidInput, InvalidTarget, NoWorkerYet, TooManyWaiting, UnknownTask
from backcast.ledger import submissions
from backcast.ledger.submissions import SubmittedRun
from backcast.models import CAST, IDEMPOTENCY_KEY, JSON, KEY_RULE, Submission, TaskType, input_key, uuid7

TARGET_FORMAT = "target"
"""A task parameter of this JSON Schema format holds a wanted shape, which is checked here before a run is accepted."""
_NOWHERE_ELSE: Mapping[str, str] = {}
_MESSAGE = 300
"""Characters of a validator's message that are returned; it quotes the input."""


def check_input(known: Known, given: dict[str, JSON], places: Mapping[str, str] = _NOWHERE_ELSE) -> TaskType:
    """The newest version of the task that accepts this input. `places` gives a parameter's place in the body, if not in
    /input. Raises `InvalidInput` or `InvalidTarget`, as the newest version has it."""
    refusal: InvalidInput | InvalidTarget | None = None
    for version in known.versions:
        try:
            _check(version, given, places)
        except (InvalidInput, InvalidTarget) as error:
            refusal = refusal or error
        else:
            return version.task
    assert refusal is not None
    raise refusal


def _check(version: Version, given: dict[str, JSON], places: Mapping[str, str]) -> None:
    def place(path: Iterable[str | int]) -> str:
        parts = [str(part) for part in path]
        return "/".join([places[parts[0]], *parts[1:]] if parts and parts[0] in places else ["/input", *parts])

    if not version.task.is_served:
        why = version.task.warnings[0] if version.task.warnings else "It can't be run here."
        raise InvalidInput(f"The task {version.task.name}: {why}", errors=(FieldError("", why),))
    try:
        found = version.inputs.misfits(given)
    except RecursionError:
        raise InvalidInput("The input is nested too deeply.", errors=(FieldError(place([]), "too deep"),)) from None
    except OverflowError as error:  # an integer that no float can hold, against a `multipleOf` that is one
        why = f"The input can't be checked: {error}."
        raise InvalidInput(why, errors=(FieldError(place([]), str(error)),)) from None
    errors = tuple(FieldError(place(error.absolute_path), error.message[:_MESSAGE]) for error in found)
    if errors:
        raise InvalidInput(f"{errors[0].pointer}: {errors[0].detail}.", errors=errors)
    is_cast = version.task.name == CAST
    for name, schema in version.task.input_schema.get("properties", {}).items():
        is_target = isinstance(schema, dict) and schema.get("format") == TARGET_FORMAT
        if not is_target or name not in given or (given[name] is None and not is_cast):
            continue
        wanted = targets.parse(given[name], pointer=place([name]))
        if is_cast and wanted.needs_instructions and not (given.get("instructions") or "").strip():
            why = "a cast to str needs instructions: describe the text that you want"
            where = place(["instructions"])
            raise InvalidInput(f"{where}: {why}.", errors=(FieldError(where, why),))


def idempotency_key(request: Request) -> str | None:
    """The request's `Idempotency-Key`; the quotes of its draft-07 form are optional."""
    header = request.headers.get("idempotency-key")
    if header is None:
        return None
    key = header.strip().removeprefix('"').removesuffix('"')
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidInput(KEY_RULE)
    return key


def in_json(given: dict[str, JSON]) -> bytes:
    """An input as it is stored: integers exactly, other numbers as the nearest IEEE double. Raises `InvalidInput`."""
    try:
        return json.dumps(given, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (UnicodeEncodeError, RecursionError, ValueError) as error:
        if (where := _not_finite(given)) is not None:
            why = "this number is beyond the range of IEEE doubles; send it as text"
            raise InvalidInput(f"/input{where}: {why}.", errors=(FieldError(f"/input{where}", why),)) from None
        raise InvalidInput(f"The input can't be stored: {error}.", errors=(FieldError("/input", str(error)),)) from None


def _not_finite(value: JSON) -> str | None:
    """The pointer to the first number that JSON can't carry (1e400 is read as infinity)."""
    left: list[tuple[str, JSON]] = [("", value)]
    while left:
        where, each = left.pop()
        if isinstance(each, float) and not math.isfinite(each):
            return where
        inner = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        left += [(f"{where}/{name}", item) for name, item in inner]
    return None


def late(submission: Submission) -> InvalidInput | None:
    """The refusal of a submission whose deadline has passed: its run could only expire."""
    if submission.deadline is None or submission.deadline > datetime.now(UTC):
        return None
    why = "the deadline has passed; send a later one, or none"
    return InvalidInput(f"/deadline: {why}.", errors=(FieldError("/deadline", why),))


async def submit(
    backend: Backend,
    name: str,
    submission: Submission,
    *,
    key: str | None,
    places: Mapping[str, str] = _NOWHERE_ELSE,
    retry_of: UUID | None = None,
) -> SubmittedRun:
    """Check and record a run; see `Submissions.submit` for the errors. A request that was accepted before, under its
    key, is not refused, whatever has changed since: its task, the time, or the number of waiting runs."""
    try:
        known = await backend.known(name)
        task = check_input(known, submission.input, places)
        body = in_json(submission.input)
        if (refusal := late(submission)) is not None:
            raise refusal
        await backend.admission.admit(submission.owner)
    except (InvalidInput, UnknownTask, NoWorkerYet, TooManyWaiting):
        if key is None:
            raise
        input_hash = hashlib.sha256(in_json(submission.input)).digest()
        request_hash = submissions.hash_of(name, submission, input_hash, retry_of)
        earlier = await submissions.repeated(backend.ledger, submission.owner, key, request_hash)
        if earlier is None:
            raise
        return earlier
    run_id = uuid7()
    large = input_key(run_id) if len(body) > submissions.INLINE_INPUT else None
    until = None
    if large is not None:
        until = await submissions.stored_until(backend.ledger)
        await backend.store.put(large, body)
    submitted = await backend.submissions.submit(
        submissions.new(
            task,
            submission,
            run_id=run_id,
            input_text=body.decode() if large is None else None,
            input_key=large,
            input_hash=hashlib.sha256(body).digest() if key is not None else b"",
            idempotency_key=key,
            retry_of=retry_of,
            stored_until=until,
        )
    )
    if large is not None and not submitted.fresh:
        await backend.store.delete([large])
    return submitted
