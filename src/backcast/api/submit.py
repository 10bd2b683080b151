"""Accepting a run: check the input against what the task takes, then record it. The 202 is sent after the commit."""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from pydantic import BaseModel

from backcast import targets
from backcast.api.deps import Backend
from backcast.errors import FieldError, InvalidInput
from backcast.ledger import runs
from backcast.ledger.runs import Submitted
from backcast.models import JSON, Label, Submission, TaskType, uuid7

TARGET_FORMAT = "target"
"""A task parameter of this JSON Schema format holds a wanted shape, which is checked here before a run is accepted."""
_NOWHERE_ELSE: Mapping[str, str] = {}
_MESSAGE = 300
"""Characters of a validator's message that are sent back; it quotes the input."""


class _Key(BaseModel):
    key: Label


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    return Draft202012Validator(json.loads(schema))


def check_input(task: TaskType, given: dict[str, JSON], places: Mapping[str, str]) -> None:
    """Raises `InvalidInput` or `InvalidTarget`; `places` says where in the body a parameter is, if not in /input."""

    def place(path: Iterable[str | int]) -> str:
        parts = [str(part) for part in path]
        return "/".join([places[parts[0]], *parts[1:]] if parts and parts[0] in places else ["/input", *parts])

    validator = _validator(json.dumps(task.input_schema))
    try:
        found: list[ValidationError] = list(validator.iter_errors(given))
    except RecursionError:
        raise InvalidInput("The input is nested too deeply.", errors=(FieldError(place([]), "too deep"),)) from None
    errors = tuple(FieldError(place(error.absolute_path), error.message[:_MESSAGE]) for error in found)
    if errors:
        raise InvalidInput(f"{errors[0].pointer}: {errors[0].detail}.", errors=errors)
    for name, schema in task.input_schema.get("properties", {}).items():
        if isinstance(schema, dict) and schema.get("format") == TARGET_FORMAT and name in given:
            targets.parse(given[name], pointer=place([name]))


def idempotency_key(header: str | None) -> str | None:
    """The key of an `Idempotency-Key` header; the quotes of its draft-07 form are optional."""
    if header is None:
        return None
    try:
        return _Key(key=header.strip().removeprefix('"').removesuffix('"')).key
    except ValueError:
        raise InvalidInput("An Idempotency-Key has 1 to 200 printable characters.") from None


async def submit(
    backend: Backend, name: str, submission: Submission, *, key: str | None, places: Mapping[str, str] = _NOWHERE_ELSE
) -> Submitted:
    """Check and record a run; see `runs.submit` for the errors."""
    task = await backend.task_type(name)
    check_input(task, submission.input, places)
    try:
        text = json.dumps(submission.input, ensure_ascii=False, separators=(",", ":"))
        body = text.encode()
    except (UnicodeEncodeError, RecursionError, ValueError) as error:
        raise InvalidInput(f"The input can't be stored: {error}.", errors=(FieldError("", str(error)),)) from None
    run_id = uuid7()
    large = f"inputs/{run_id}.json" if len(body) > runs.INLINE_INPUT else None
    if large is not None:
        await backend.store.put(large, body)
    submitted = await runs.submit(
        backend.ledger,
        task,
        submission,
        run_id=run_id,
        input_text=text if large is None else None,
        input_key=large,
        input_hash=hashlib.sha256(body).digest(),
        idempotency_key=key,
        max_attempts=task.max_attempts,
    )
    if large is not None and not submitted.fresh:
        await backend.store.delete([large])
    return submitted
