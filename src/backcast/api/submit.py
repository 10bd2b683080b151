"""Accepts a run: checks the input against the task's schema, then records it. The 202 is sent after the commit."""

import hashlib
import json
from collections.abc import Iterable, Mapping

from fastapi import Request
from jsonschema.exceptions import ValidationError
from pydantic import BaseModel

from backcast import targets
from backcast.api.deps import Backend, Known
from backcast.errors import FieldError, InvalidInput, TooManyWaiting
from backcast.ledger import submissions
from backcast.ledger.submissions import SubmittedRun
from backcast.models import JSON, Label, Submission, uuid7

TARGET_FORMAT = "target"
"""A task parameter of this JSON Schema format holds a wanted shape, which is checked here before a run is accepted."""
_NOWHERE_ELSE: Mapping[str, str] = {}
_MESSAGE = 300
"""Characters of a validator's message that are returned; it quotes the input."""


class _Key(BaseModel):
    key: Label


def check_input(known: Known, given: dict[str, JSON], places: Mapping[str, str] = _NOWHERE_ELSE) -> None:
    """Raises `InvalidInput` or `InvalidTarget`; `places` gives a parameter's place in the body, if not in /input."""

    def place(path: Iterable[str | int]) -> str:
        parts = [str(part) for part in path]
        return "/".join([places[parts[0]], *parts[1:]] if parts and parts[0] in places else ["/input", *parts])

    try:
        found: list[ValidationError] = list(known.validator.iter_errors(given))
    except RecursionError:
        raise InvalidInput("The input is nested too deeply.", errors=(FieldError(place([]), "too deep"),)) from None
    errors = tuple(FieldError(place(error.absolute_path), error.message[:_MESSAGE]) for error in found)
    if errors:
        raise InvalidInput(f"{errors[0].pointer}: {errors[0].detail}.", errors=errors)
    for name, schema in known.task.input_schema.get("properties", {}).items():
        if isinstance(schema, dict) and schema.get("format") == TARGET_FORMAT and name in given:
            targets.parse(given[name], pointer=place([name]))


def idempotency_key(request: Request) -> str | None:
    """The request's `Idempotency-Key`; the quotes of its draft-07 form are optional."""
    header = request.headers.get("idempotency-key")
    if header is None:
        return None
    try:
        return _Key(key=header.strip().removeprefix('"').removesuffix('"')).key
    except ValueError:
        raise InvalidInput("An Idempotency-Key has 1 to 200 printable characters.") from None


def in_json(given: dict[str, JSON]) -> bytes:
    """An input as it is stored. Raises `InvalidInput`."""
    try:
        return json.dumps(given, ensure_ascii=False, separators=(",", ":")).encode()
    except (UnicodeEncodeError, RecursionError, ValueError) as error:
        raise InvalidInput(f"The input can't be stored: {error}.", errors=(FieldError("", str(error)),)) from None


async def submit(
    backend: Backend, name: str, submission: Submission, *, key: str | None, places: Mapping[str, str] = _NOWHERE_ELSE
) -> SubmittedRun:
    """Check and record a run; see `Submissions.submit` for the errors."""
    known = await backend.known(name)
    check_input(known, submission.input, places)
    body = in_json(submission.input)
    try:
        await backend.admission.admit(submission.owner)
    except TooManyWaiting:
        if key is None or not await submissions.has_key(backend.ledger, submission.owner, key):
            raise
    run_id = uuid7()
    large = f"inputs/{run_id}.json" if len(body) > submissions.INLINE_INPUT else None
    until = None
    if large is not None:
        until = await submissions.stored_until(backend.ledger)
        await backend.store.put(large, body)
    submitted = await backend.submissions.submit(
        submissions.new(
            known.task,
            submission,
            run_id=run_id,
            input_text=body.decode() if large is None else None,
            input_key=large,
            input_hash=hashlib.sha256(body).digest() if key is not None else b"",
            idempotency_key=key,
            stored_until=until,
        )
    )
    if large is not None and not submitted.fresh:
        await backend.store.delete([large])
    return submitted
